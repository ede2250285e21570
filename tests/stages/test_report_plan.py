"""What a report and a comparison are made from beside their own section, without a model that is run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ifguide.artifacts import MismatchError, open_artifact
from ifguide.config import Config, config_from_mapping
from ifguide.evaluation.subjects import Model
from ifguide.run import Run
from ifguide.stages import compare, evaluate


class Measured(Exception):
    pass


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """Of a run with a baseline; what would measure its models raises `Measured`."""

    def measure(*_: Any, **__: Any) -> None:
        raise Measured

    monkeypatch.setattr(evaluate, "measure_models", measure)
    monkeypatch.setattr(compare, "evaluation_of", measure)
    for name, row in (("prompts", {"prompt": "a pig"}), ("heldout", {"text": "a plum"})):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    section = {"prompts": str(tmp_path / "prompts.jsonl"), "heldout": [str(tmp_path / "heldout.jsonl")]}
    made = config_from_mapping({"run_dir": str(tmp_path / "run"), "evaluate": section})
    model = open_artifact(Run(config=made).model("baseline"), verb="pretrain", options={}, inputs={}, config_yaml="")
    model.finish([], rows={}, summary={})
    return made


def compared(run: Run) -> Any:
    grid: Any = SimpleNamespace(own=("baseline",), models={"baseline": Model("", "its fingerprint")})
    return compare._measure(run, grid)


@pytest.mark.parametrize("measured", [evaluate.evaluate, compared])
@pytest.mark.parametrize("heldout", [True, False])
def test_heldout_perplexity_is_of_blocks_of_one_length(
    measured: Callable[[Run], Any], heldout: bool, config: Config
) -> None:
    if not heldout:
        config = replace(config, evaluate=replace(config.evaluate, heldout=()))
    with pytest.raises(Measured):
        measured(Run(config=config))
    longer = replace(config, pack_corpus=replace(config.pack_corpus, block_size=2048))
    error, message = (MismatchError, r"pack_corpus\.block_size was 1024, now 2048") if heldout else (Measured, None)
    with pytest.raises(error, match=message):
        measured(Run(config=longer))
