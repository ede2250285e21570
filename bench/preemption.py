"""A training that SIGTERM ends in the middle of a step and that goes on, beside one that nobody ends.

    python bench/preemption.py [--signals 3] [--folder DIR]

Both train the same small model on the demo's documents, from the same weights, by one process without Ray. The one is
sent SIGTERM half a step after it has logged one, at so many places of the training; it saves the step it is at, ends
with code 143, and is started again. Printed are the steps that were saved, how long each end took, which processes were
left, and both losses at the end; last one JSON object: `saved_steps`, `seconds_to_end`, `processes_left`, `steps`,
`loss_whole`, `loss_ended` and `weights_equal`, which says whether the exported weights are the same bytes.

On a cluster Ray's own notice does the same to a training under Ray: tests/stages/test_preemption.py.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from bench.common.places import ROOT
from ifguide.artifacts import file_digest
from ifguide.folders import BASELINE, EXPORT, MODEL
from ifguide.telemetry import METRICS, read_metrics
from ifguide.training.checkpoints import last_checkpoint

SETTINGS = {
    "pretrain.engine": "torch",
    "pretrain.workers": "1",
    "pretrain.use_mask": "false",
    "pretrain.dtype": "float32",
    "pretrain.log_steps": "1",
    "pretrain.checkpoint_steps": "1000000",
    "pretrain.resources.gpus": "0",
}
CODE = 128 + signal.SIGTERM


def main() -> None:
    options = _options()
    folder = Path(options.folder or tempfile.mkdtemp(prefix="preemption-"))
    whole, ended = folder / "whole", folder / "ended"
    _Command(whole, "demo", "--data-only").check()
    _Command(whole, "pack_corpus").check()
    shutil.copytree(whole, ended)
    _Command(whole, "pretrain").check()
    rows = read_metrics(_model(whole) / METRICS)
    steps, pace = len(rows), _seconds_of_a_step(_model(whole))
    ends = [_end(ended, step=steps * (i + 1) // (options.signals + 1), pace=pace) for i in range(options.signals)]
    _Command(ended, "pretrain").check()
    last = {name: read_metrics(_model(run) / METRICS)[-1] for name, run in (("whole", whole), ("ended", ended))}
    for name, row in last.items():
        print(f"{name}: loss {row['loss_benign']!r} at step {row['step']}")
    weights = {file_digest(_model(run) / EXPORT / "model.safetensors") for run in (whole, ended)}
    figures = {
        **{key: [end[key] for end in ends] for key in ends[0]},
        "steps": steps,
        **{f"loss_{name}": row["loss_benign"] for name, row in last.items()},
        "weights_equal": len(weights) == 1,
    }
    print(json.dumps(figures))


class _Command:
    """A command of the program in a process of its own, on a run directory."""

    def __init__(self, run: Path, *arguments: str):
        settings = [f"{key}={value}" for key, value in {**SETTINGS, "run_dir": str(run)}.items()]
        changes = [part for setting in settings for part in ("--set", setting)]
        command = [sys.executable, "-m", "ifguide.cli", *arguments, "--config", "tiny", *changes]
        run.mkdir(parents=True, exist_ok=True)
        with (run.parent / f"{run.name}.log").open("ab") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        self.log = Path(log.name)

    def check(self) -> None:
        """Wait for it to end well."""
        if self.process.wait():
            sys.exit(f"it ended with {self.process.returncode}: {self.log.read_text()[-2000:]}")


def _end(run: Path, *, step: int, pace: float) -> dict[str, Any]:
    """Train until half a step after `step`, and no longer."""
    training = _Command(run, "pretrain").process
    while training.poll() is None and len(read_metrics(_model(run) / METRICS)) < step:
        time.sleep(0.005)
    started = psutil.Process(training.pid).children(recursive=True)
    time.sleep(pace / 2)
    now = time.monotonic()
    training.send_signal(signal.SIGTERM)
    code = training.wait(timeout=60)
    seconds = time.monotonic() - now
    left = [process.pid for process in started if process.is_running()]
    checkpoint = last_checkpoint(_model(run))
    if code != CODE or checkpoint is None:
        sys.exit(f"it ended with {code}, where {CODE} was wanted, and saved {checkpoint}")
    print(f"SIGTERM after step {step}: step {checkpoint.step} saved, ended in {seconds:.2f} s with code {code}")
    return {"saved_steps": checkpoint.step, "seconds_to_end": round(seconds, 2), "processes_left": len(left)}


def _seconds_of_a_step(model: Path) -> float:
    rows = read_metrics(model / METRICS)[:-1]
    return statistics.median(row["eta_seconds"] / (row["steps"] - row["step"]) for row in rows)


def _model(run: Path) -> Path:
    return run / MODEL / BASELINE


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--signals", type=int, default=3, help="how often it is ended (default 3)")
    parser.add_argument("--folder", help="where to work; a new temporary one if it is not given")
    return parser.parse_args()


if __name__ == "__main__":
    main()
