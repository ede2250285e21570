"""The demo's figures: `python bench/demo.py [--seeds 0 1 2]`, one run per seed and the first seed once more.

Prints each run's JSON, then one line: per figure the values of all seeds, and whether the second run of the first
seed gave the same digests of corpus, factors, query, scores and mask. About seven minutes a run on two cores.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from bench.common.places import this_machine
from ifguide.folders import CORPUS, FACTORS, MASK, QUERY, SCORES

COMPARED = (CORPUS, FACTORS, QUERY, SCORES, MASK)


def run_demo(seed: int, run_dir: Path) -> dict[str, float]:
    """One demo from nothing in `run_dir`; returns its last line."""
    shutil.rmtree(run_dir, ignore_errors=True)
    command = [sys.executable, "-m", "ifguide.cli", "demo", "--set", f"seed={seed}", "--set", f"run_dir={run_dir}"]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    figures = json.loads(output.splitlines()[-1])
    print(json.dumps({"seed": seed, **figures}), flush=True)
    return figures


def digests(run_dir: Path) -> dict[str, str]:
    """Fingerprints of the artifacts that must not change from run to run."""
    return {name: json.loads((run_dir / name / "manifest.json").read_text())["fingerprint"] for name in COMPARED}


def main() -> None:
    """Run all seeds, then the first one again."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/bench"))
    parser.add_argument("--once", action="store_true", help="leave the repetition of the first seed out")
    options = parser.parse_args()
    runs = [run_demo(seed, options.folder / f"demo-seed{seed}") for seed in options.seeds]
    result: dict[str, object] = {"seeds": options.seeds, **{name: [run[name] for run in runs] for name in runs[0]}}
    if not options.once:
        first = options.seeds[0]
        run_demo(first, options.folder / "demo-again")
        result["same_digests"] = digests(options.folder / f"demo-seed{first}") == digests(options.folder / "demo-again")
    result["machine"] = this_machine()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
