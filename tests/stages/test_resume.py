"""A training job killed half-way goes on to the same weights."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from ifguide.artifacts import read_manifest
from ifguide.config import Config, to_mapping
from ifguide.stages.checkpoints import last_checkpoint
from ifguide.stages.run import Run


@pytest.mark.timeout(400)
def test_a_killed_training_resumes_to_the_same_bytes(finished: Config, tmp_path: Path) -> None:
    run_dir = tmp_path / "killed"
    shutil.copytree(Path(finished.run_dir) / "corpus", run_dir / "corpus")
    tree = {**to_mapping(finished), "run_dir": str(run_dir)}
    tree["pretrain"] |= {"use_mask": False, "checkpoint_steps": 4}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    command = [sys.executable, "-m", "ifguide.cli", "pretrain", "--config", str(tmp_path / "config.yaml")]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_ADDRESS")}
    folder = run_dir / "model" / "baseline"
    process = subprocess.Popen(command, start_new_session=True, env=environment)
    deadline = time.monotonic() + 150
    while last_checkpoint(folder) is None and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=30)
    assert last_checkpoint(folder) is not None, "no checkpoint before the deadline"
    assert not (folder / "manifest.json").exists(), "it had finished before it could be killed"
    subprocess.run(command, check=True, env=environment, timeout=200)
    assert read_manifest(folder).fingerprint == read_manifest(Run(config=finished).model("baseline")).fingerprint
