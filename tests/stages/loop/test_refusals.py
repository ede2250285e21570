"""What a training refuses, and what it says of failures."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.train import ControllerError, WorkerGroupError
from transformers import AutoConfig

from ifguide.artifacts import Manifest, MismatchError, read_manifest
from ifguide.config import ModelSource, config_from_mapping, to_mapping
from ifguide.distributed.shards import StageError
from ifguide.models import load_model
from ifguide.run import Run
from ifguide.stages.pretrain import _reason, pretrain
from ifguide.tokenizer import train_tokenizer
from ifguide.training import loop as training_loop
from ifguide.training.engines import TorchEngine
from ifguide.training.loop import TrainingLoop
from tests.stages.conftest import ARCHITECTURE
from tests.stages.loop.conftest import Options, flip_a_bit
from tests.stages.packed import settings_of


@pytest.mark.parametrize("name", ["corpus", "mask"])
def test_a_changed_corpus_or_mask_is_not_trained_on(name: str, run: Run, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run.folder, copy, ignore=shutil.ignore_patterns("model"))
    damaged = copy / name / "shard-00001.parquet"
    flip_a_bit(damaged)
    with pytest.raises(ValueError, match=rf"{name}/shard-00001\.parquet has changed since it was made"):
        pretrain(Run(config=replace(run.config, run_dir=str(copy))))
    assert not list(copy.glob("model/*/hf"))


def test_a_training_that_diverges_at_once_ends_in_its_advice_alone(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TorchEngine, "end_step", lambda engine: float("nan"))
    lent = {"corpus": run.corpus, "mask": run.mask}
    with pytest.raises(StageError, match=r"^the loss is .* norm nan at step 1; lower pretrain\.learning_rate"):
        pretrain(Run(config=replace(run.config, run_dir=str(tmp_path)), lent=lent))


def test_of_several_failed_workers_the_one_that_says_what_to_do_is_heard(tmp_path: Path) -> None:
    lost, advice = RuntimeError("Connection closed by peer"), FloatingPointError("the loss is nan; lower it")
    failure, both_lost = tmp_path / "failure.txt", WorkerGroupError("...", {1: lost, 0: lost})
    assert _reason(failure, WorkerGroupError("...", {1: advice, 0: lost})) == "the loss is nan; lower it"
    assert _reason(failure, both_lost) == "worker 0: RuntimeError: Connection closed by peer"
    assert "no worker" in _reason(failure, ControllerError(RuntimeError("no worker")))
    failure.write_text("the loss is nan at step 2")
    assert _reason(failure, both_lost) == "the loss is nan at step 2"


@pytest.mark.parametrize(
    ("options", "positions", "message"),
    [
        ({"heldout_blocks": 168}, 32, r"pretrain\.heldout_blocks: 168 of the corpus' 168 blocks"),
        ({}, 31, r"pack_corpus\.block_size: 32 tokens are more than the 31 positions of target\.architecture"),
        ({"init_from": "short"}, 32, r"pack_corpus\.block_size: 32 tokens are more than the 16 positions of .*short"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_any_worker_starts(
    options: Options, positions: int, message: str, run: Run, tmp_path: Path
) -> None:
    fields = {**ARCHITECTURE, "max_position_embeddings": 16}
    AutoConfig.for_model(**fields).save_pretrained(tmp_path / "short")
    tree = to_mapping(run.config) | {"run_dir": str(tmp_path / "run")}
    tree["pretrain"] |= {
        key: str(tmp_path / "short") if key == "init_from" else value for key, value in options.items()
    }
    tree["target"]["architecture"] |= {"max_position_embeddings": positions}
    lent = {"corpus": run.corpus, "mask": run.mask}
    with pytest.raises(ValueError, match=f"^{message}"):
        pretrain(Run(config=config_from_mapping(tree), lent=lent))
    assert not (tmp_path / "run").exists()


def test_weights_of_other_tokens_than_the_corpus_are_refused_before_any_worker_starts(run: Run, tmp_path: Path) -> None:
    AutoConfig.for_model(**ARCHITECTURE, vocab_size=300).save_pretrained(tmp_path / "published")
    train_tokenizer(["quite other words than those"], vocab_size=300).save_pretrained(tmp_path / "published")
    tree = to_mapping(run.config) | {"run_dir": str(tmp_path / "run")}
    tree["pretrain"]["init_from"] = str(tmp_path / "published")
    with pytest.raises(ValueError, match=r"^pretrain\.tokenizer: token \d+ is .* set pretrain\.tokenizer=.*published"):
        pretrain(Run(config=config_from_mapping(tree), lent={"corpus": run.corpus, "mask": run.mask}))
    assert not (tmp_path / "run").exists()


def test_the_best_of_other_steps_is_another_model(run: Run, tmp_path: Path) -> None:
    def made(**changes: int) -> Manifest | None:
        tree = to_mapping(run.config) | {"run_dir": str(tmp_path)}
        tree["pretrain"] |= {"export": "best", "epochs": 0.2, **changes}
        return pretrain(Run(config=config_from_mapping(tree), lent={"corpus": run.corpus, "mask": run.mask}))

    assert made() == made(keep_best=2, keep_last=3)
    with pytest.raises(MismatchError, match=r"pretrain\.checkpoint_steps was 2, now 1"):
        made(checkpoint_steps=1)


def test_a_model_that_zero_has_placed_is_left_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Moved to the CPU, its placeholders would stay there, for DeepSpeed does not move what it has parted."""
    moved: list[Any] = []
    to = torch.nn.Module.to

    def record(module: torch.nn.Module, device: Any) -> torch.nn.Module:
        moved.append(device)
        return to(module, device)

    source = ModelSource(architecture={**ARCHITECTURE, "vocab_size": 50})
    monkeypatch.setattr(torch.nn.Module, "to", record)
    load_model(source)
    assert moved == []
    assert load_model(source, device="meta").device.type == "meta"
    assert moved == ["meta"]


def test_workers_that_see_other_checkpoints_are_told_what_they_lack(
    train: Callable[..., Path], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gather(found: list[Any], own: Any) -> None:
        found[:] = [own, None]

    folder = train("seen", epochs=0.2)
    for name in ("new_group", "barrier"):
        monkeypatch.setattr(training_loop.torch.distributed, name, lambda **_: None)
    monkeypatch.setattr(training_loop.torch.distributed, "all_gather_object", gather)
    with pytest.raises(RuntimeError, match=r"of steps \[2, None\]: run_dir must lie on storage that all nodes mount"):
        TrainingLoop(settings_of(run, folder), rank=0, world_size=2)
    assert read_manifest(run.corpus).rows["blocks"] == 168
