"""All that waits for a GPU, by one command of at most 25 minutes on one H100 or H200; running it again goes on.

    python bench/gpu.py [--folder runs/gpu] [--record]
    python bench/gpu.py --small                      # every step at toy size on a CPU
    python bench/gpu.py --steps training_160m        # one of them, once more

Steps: what the machine has and lacks; training steps at the shapes of Pythia-160M and 1B, with and without a mask;
the head's loss beside liger-kernel's and cut-cross-entropy's, where these are installed; scoring at two shapes; the
whole pipeline on the demo's documents in bfloat16, two scoring actors on half of the
device each; the same scores by one actor; a training that is killed and goes on; a comparison with one DPO. A step
that is done is not run again. One that fails says why and stops no other but those that need it; after `--minutes`
none is begun.

`--record` writes a dated section of bench/LOG.md and rows for ifguide/planning/measurements.yaml. The last line is one
JSON object: mfu_160m, mfu_1b, mask_time_ratio, equal_bytes, resumed_from and more, `failed` and `left` by name.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch

from bench.common.gpu_record import record
from bench.common.gpu_steps import AFTER, STEPS, Session
from bench.common.places import CACHE

DONE = "steps"  # folder of a JSON file for each step that is done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where all of it lies (default: runs/bench/gpu, or gpu-small)")
    parser.add_argument("--small", action="store_true", help="toy sizes on a CPU: whether every step runs")
    parser.add_argument("--steps", nargs="+", choices=list(STEPS), help="run these, done or not")
    parser.add_argument("--minutes", type=float, default=25.0, help="after which no step is begun (default 25)")
    parser.add_argument(
        "--record", action="store_true", help="write what came out to bench/LOG.md and the measurements"
    )
    options = parser.parse_args()
    if not options.small and not torch.cuda.is_available():
        parser.error("this machine has no GPU that torch sees; --small runs every step at toy size on a CPU")
    folder = (options.folder or CACHE / ("gpu-small" if options.small else "gpu")).resolve()
    result = run(Session(folder=folder, small=options.small), options.steps, options.minutes)
    if options.record:
        record(result, today=date.today())
    print(json.dumps(result))


def run(session: Session, wanted: list[str] | None, minutes: float) -> dict[str, Any]:
    """Run what is not done, or what is `wanted`; the figures of all that is done."""
    started = time.monotonic()
    (session.folder / DONE).mkdir(parents=True, exist_ok=True)
    failed: dict[str, str] = {}
    for name in wanted or STEPS:
        path = session.folder / DONE / f"{name}.json"
        needed = AFTER.get(name)
        if path.exists() and not wanted:
            continue
        if time.monotonic() - started > 60 * minutes:
            break
        if needed and not (session.folder / DONE / f"{needed}.json").exists():
            failed[name] = f"needs {needed}"
            continue
        print(f"{name} ...", flush=True)
        begun = time.monotonic()
        try:
            figures = STEPS[name](session)
        except Exception as error:  # whatever it is, the other steps are worth their time
            failed[name] = f"{type(error).__name__}: {error}"
            print(f"{name} failed: {failed[name]}", flush=True)
            continue
        took = round(time.monotonic() - begun, 1)
        part = path.with_suffix(".part")
        part.write_text(json.dumps({"took": took, **figures}, indent=2))
        os.replace(part, path)
        print(f"{name}: {took} s", flush=True)
    return summed_up(session, failed)


def summed_up(session: Session, failed: dict[str, str]) -> dict[str, Any]:
    """The figures by name, and what is not there."""
    done = {path.stem: json.loads(path.read_text()) for path in sorted((session.folder / DONE).glob("*.json"))}

    def of(step: str, name: str) -> Any:
        return done.get(step, {}).get(name)

    return {
        "mfu_160m": of("training_160m", "mfu"),
        "mfu_1b": of("training_1b", "mfu"),
        "mask_time_ratio": of("training_160m", "mask_time_ratio"),
        "syncs_per_step": of("training_160m", "syncs_per_step"),
        "equal_bytes": of("equal_bytes", "equal_bytes"),
        "resumed_from": of("resuming", "resumed_from"),
        "pipeline_seconds": of("pipeline", "seconds"),
        "lacking": of("machine", "lacking"),
        "failed": failed,
        "left": [name for name in STEPS if name not in done and name not in failed],
        "small": session.small,
        "steps": done,
    }


if __name__ == "__main__":
    main()
