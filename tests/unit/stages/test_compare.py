"""What `compare` refuses before anything is trained, without a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ifguide.artifacts import open_artifact
from ifguide.config import ConfigError, config_from_mapping
from ifguide.preflight import PreflightError, preflight
from ifguide.run import Run
from ifguide.stages.compare import compare


def run_of(folder: Path, **changes: Any) -> Run:
    tree = {
        "run_dir": str(folder),
        "evaluate": {"prompts": "prompts.jsonl", "classifier": "alt-profanity-check"},
        "compare": {"methods": {"random": {"mask": "random"}}},
    }
    return Run(config=config_from_mapping({**tree, **changes}))


def put(folder: Path, verb: str) -> None:
    open_artifact(folder, verb=verb, options={}, inputs={}, config_yaml="").finish([], rows={}, summary={})


def refusals(run: Run) -> list[str]:
    """What the preflight of `compare` says; `compare` itself refuses what it does."""
    try:
        preflight(run.config, ["compare"])
    except PreflightError as error:
        with pytest.raises(ConfigError):
            compare(run, dry_run=True)
        return [str(fault) for fault in error.faults]
    compare(run, dry_run=True)
    return []


def test_a_run_without_a_plain_model_is_refused(tmp_path: Path) -> None:
    run = run_of(tmp_path, baseline=False, proxy=str(tmp_path))
    expected = "compare sets models beside the plain one; set baseline: true"
    assert refusals(run) == [f"baseline = false: {expected}"]
    with pytest.raises(ConfigError, match=f"^baseline: {expected}$"):
        compare(run)
    put(run.model("baseline"), "pretrain")
    assert refusals(run) == []
    assert refusals(run_of(tmp_path / "another")) == []
