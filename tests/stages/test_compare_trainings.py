"""`compare` with several trainings at once: the models of trainings one by one, and what becomes of the others when one
fails. tests/stages/test_signals.py ends them by a signal."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from ifguide.config import Config, ConfigError
from ifguide.config.compare import Compare, Method
from ifguide.distributed.shards import StageError
from ifguide.run import Run
from ifguide.stages.compare import _side_by_side, compare
from ifguide.stages.pretrain import pretrain


def test_models_trained_at_once_are_those_trained_one_by_one(
    copied: Callable[..., Config], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    config = copied()
    methods = {"same": Method(mask="influence"), "filter": Method(mask="words", objective="ignore")}
    train = replace(config.pretrain, engine="deepspeed", log_steps=1)
    config = replace(config, pretrain=train, compare=Compare(methods=methods, trainings=2))
    run = Run(config=config)
    shutil.rmtree(run.model("penalised"))
    shutil.rmtree(run.generations("penalised"))
    pretrain(run)
    wide = replace(config, pretrain=replace(train, workers=2, micro_batch_blocks=1))
    with pytest.raises(ConfigError, match=r"4 processes of 1 CPU .*; lower it or compare\.trainings"):
        compare(Run(config=wide))
    manifest = compare(run)
    assert manifest is not None
    assert list(manifest.summary) == ["baseline", "penalised", "same", "filter"]
    weights = [
        (folder / "hf" / "model.safetensors").read_bytes()
        for folder in (run.model("penalised"), run.folder / "compare" / "same" / "model" / "penalised")
    ]
    assert weights[0] == weights[1]
    said = [record.getMessage() for record in caplog.records]
    first = {name: next(i for i, text in enumerate(said) if f"{name} step" in text) for name in ("same", "filter")}
    last = {name: next(i for i, text in enumerate(said) if name in text and "last loss" in text) for name in first}
    assert max(first.values()) < min(last.values())  # both had begun before one had ended


def test_of_trainings_side_by_side_one_that_fails_lets_the_others_end_and_begins_none() -> None:
    begun, ended, both = [], [], threading.Barrier(2, timeout=60)

    def training(name: str, fails: bool) -> Callable[[], None]:
        def train() -> None:
            begun.append(name)
            both.wait()
            if fails:
                raise StageError(f"{name} fell")
            time.sleep(0.2)
            ended.append(name)

        return train

    trainings = {"a": training("a", fails=True), "b": training("b", fails=False), "c": training("c", fails=False)}
    with pytest.raises(StageError, match="a fell"):
        _side_by_side(trainings, at_once=2)
    assert sorted(begun) == ["a", "b"]
    assert ended == ["b"]
