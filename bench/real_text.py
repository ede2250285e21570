"""The real-text figures: `python bench/real_text.py [--config configs/civil_comments.yaml]`.

Runs the pipeline (or resumes it, or finds it finished) and prints one JSON line: the report's figures, and the
seconds that the stages took by their manifests. Needs the data that the config names.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

from ifguide.config import load_config


def main() -> None:
    """Run the config, sum it up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("configs/civil_comments.yaml"))
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="a.b=c")
    options = parser.parse_args()
    flags = [flag for override in options.overrides for flag in ("--set", override)]
    command = [sys.executable, "-m", "ifguide.cli", "run", "--config", str(options.config), *flags]
    subprocess.run(command, check=True)
    run_dir = Path(load_config(options.config, options.overrides).run_dir)
    manifests = [json.loads(path.read_text()) for path in sorted(run_dir.rglob("manifest.json"))]
    report = json.loads((run_dir / "report" / "manifest.json").read_text())
    mask = json.loads((run_dir / "mask" / "manifest.json").read_text())["summary"]
    result = {
        **report["summary"],
        "tau": mask["tau"],
        "tokens_masked": mask["tokens_masked"],
        "documents_masked": mask["units_masked"],
        "stage_seconds": round(sum(manifest["seconds"] for manifest in manifests), 1),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU",
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
