"""`ray job submit` on a cluster of two nodes with a job server: from submission to exit status, logs and artifacts."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from bench.common.local_cluster import PATIENCE, free_ports
from ifguide.artifacts import read_manifest
from ifguide.config import Config, to_mapping

ROOT = Path(__file__).parents[2]


@pytest.fixture
def submit(tmp_path: Path) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """Submits a job to a cluster of two nodes that `cluster/local.sh` starts, and waits for its end."""
    port = free_ports(3)
    binaries = Path(sys.executable).parent
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | {
        **PATIENCE,
        "PATH": f"{binaries}:{os.environ['PATH']}",
        "STATE": str(tmp_path / "cluster"),
        "PORT": str(port),  # and the next one, for Ray's client server
        "DASHBOARD_PORT": str(port + 2),
    }
    script = str(ROOT / "cluster" / "local.sh")
    client = dict(environment)

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(binaries / "ray"), "job", "submit", "--", sys.executable, *command],
            env=client, capture_output=True, text=True,
        )  # fmt: skip

    try:
        subprocess.run([script, "start"], env=environment, check=True, stdout=subprocess.DEVNULL)
        exports = subprocess.run([script, "env"], env=environment, check=True, capture_output=True, text=True).stdout
        client |= dict(word.split("=", 1) for word in shlex.split(exports) if "=" in word)
        yield run
    finally:
        subprocess.run([script, "stop"], env=environment, check=True)


@pytest.mark.slow
def test_a_submitted_job_scores_the_corpus_and_a_wrong_one_says_why(
    submit: Callable[..., Any], copied: Callable[..., Config], finished: Config, tmp_path: Path
) -> None:
    config = copied(drop=("scores", "ranking", "mask"), cluster__num_cpus=None)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(to_mapping(config)))
    job = str(ROOT / "jobs" / "score_corpus.py")

    done = submit(job, "--config", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "score_corpus" in done.stdout  # the job's own log came back
    assert "succeeded" in done.stdout
    scores = read_manifest(Path(config.run_dir) / "scores")
    assert scores.fingerprint == read_manifest(Path(finished.run_dir) / "scores").fingerprint

    wrong = submit(job, "--config", str(path), "--set", "score_corpus.actors=2")
    assert wrong.returncode != 0
    assert "score_corpus.actors" in wrong.stdout + wrong.stderr
