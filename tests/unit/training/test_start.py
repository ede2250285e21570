"""How a training starts: how long its ranks wait, how many there are, and what model they build."""

from __future__ import annotations

import multiprocessing
import os
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from ifguide.config import ConfigError, ModelSource, Pretrain
from ifguide.config.resources import WorkerResources
from ifguide.models import load_model
from ifguide.shapes import model_shape
from ifguide.stages.pretrain import _trainer
from ifguide.training import model
from ifguide.training.choices import Choices, Compiled
from ifguide.training.model import architecture, build_model, trained_model, write_model
from ifguide.training.settings import TrainingSettings
from tests.tiny import ARCHITECTURES
from tests.tokenizers import byte_level, tokenizers

TIMEOUT = 2.0  # seconds, of the process group


def settings_of(folder: Path, **changes: Any) -> TrainingSettings:
    settings = TrainingSettings(
        name="model",
        folder=str(folder),
        corpus="corpus",
        mask=None,
        tokenizer="tokenizer",
        block_size=16,
        target=ModelSource(architecture=ARCHITECTURES["llama"]),
        train=Pretrain(resources=WorkerResources(gpus=0)),
        seed=0,
    )
    return replace(settings, **changes)


def _wait(rank: int, folder: Path) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    import torch

    from ifguide.training.loop import PATIENCE, TrainingLoop

    store = f"file://{folder / 'store'}"
    timeout = timedelta(seconds=TIMEOUT)
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timeout)
    loop = object.__new__(TrainingLoop)
    loop.world_size = 2
    loop.patient = loop._group(timeout=PATIENCE)
    if rank == 0:  # it writes files for all
        time.sleep(2 * TIMEOUT)
    loop._barrier()
    (folder / f"done{rank}").write_text("")


def test_ranks_wait_longer_for_one_at_work_on_files_than_for_each_others_gradients(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ifguide.training.loop"])
    ranks = [context.Process(target=_wait, args=(rank, tmp_path), daemon=True) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=120)
        process.kill()
    assert {path.name for path in tmp_path.glob("done*")} == {"done0", "done1"}


def test_a_group_is_not_ended_because_the_cluster_has_grown(tmp_path: Path) -> None:
    """Ray Train would look every minute, and end a group without a checkpoint to begin a larger one."""
    train = Pretrain(min_workers=1, workers=4, batch_blocks=64, resources=WorkerResources(gpus=0))
    settings = settings_of(tmp_path, train=train)
    trainer = _trainer(settings)
    assert trainer.run_config.failure_config.controller_failure_limit == -1
    assert _trainer(settings, fixed=True).run_config.failure_config.controller_failure_limit == 10
    scaling = trainer.scaling_config
    assert (scaling.min_workers, scaling.max_workers) == (1, 4)
    assert scaling.elastic_resize_monitor_interval_s == float("inf")


def test_the_vocabulary_of_a_named_target_is_that_of_a_tokenizer_trained_for_it(tmp_path: Path) -> None:
    tokenizer = tokenizers()["bytes"]
    fields = {**ARCHITECTURES["llama"], "vocab_size": 5000}
    load_model(ModelSource(architecture=fields)).config.save_pretrained(tmp_path)
    named = ModelSource(source=str(tmp_path))
    assert architecture(named, tokenizer, 32, trained_tokenizer=True)["vocab_size"] == len(tokenizer)
    assert architecture(named, tokenizer, 32)["vocab_size"] == 5000, (
        "a published tokenizer leaves room beside its tokens"
    )
    given = ModelSource(architecture=fields)
    assert architecture(given, tokenizer, 32, trained_tokenizer=True)["vocab_size"] == 5000, "as it was asked for"


@pytest.mark.parametrize("padding", [None, "<pad>"])
def test_a_padding_token_beyond_the_vocabulary_is_not_taken_over(padding: str | None, tmp_path: Path) -> None:
    """OLMo-2 has one of number 100277, Phi-3 of 32000; a tokenizer trained for them is smaller."""
    tokenizer = byte_level()
    if padding is not None:
        tokenizer.add_special_tokens({"pad_token": padding})
    named = ModelSource(source=str(tmp_path / "named"))
    published = {**ARCHITECTURES["llama"], "vocab_size": 5000, "pad_token_id": 4999}
    load_model(ModelSource(architecture=published)).config.save_pretrained(tmp_path / "named")
    assert model_shape(named, "target", vocabulary=len(tokenizer)).vocabulary == len(tokenizer)
    settings = settings_of(tmp_path, target=named, trained_tokenizer=True)
    built = build_model(settings, tokenizer, tokens=1).model
    write_model(trained_model(settings, built, built.state_dict()), tokenizer, tmp_path / "made")
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    assert made.config.vocab_size == len(tokenizer)
    assert made.config.pad_token_id == made.generation_config.pad_token_id == tokenizer.pad_token_id
    assert (tokenizer.pad_token_id is None) == (padding is None)


def test_a_training_that_goes_on_keeps_the_attention_that_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, uncompiled = byte_level(), Compiled(False, "as before")
    masked = Choices(layers=uncompiled, loss=uncompiled, attention="sdpa")
    skipping = replace(masked, attention="flex_attention")
    fields = {**ARCHITECTURES["llama"], "vocab_size": len(tokenizer)}
    train = Pretrain(document_attention=True, resources=WorkerResources(gpus=1))
    settings = settings_of(tmp_path, target=ModelSource(architecture=fields), train=train)

    def attention(chosen: Choices | None) -> str:
        made = build_model(settings, tokenizer, tokens=1, chosen=chosen)
        assert made.choices is not None
        assert made.model.config._attn_implementation == made.choices.attention
        return made.choices.attention

    monkeypatch.setattr(model, "can_fuse", lambda device: True)
    assert [attention(chosen) for chosen in (None, masked, skipping)] == ["flex_attention", "sdpa", "flex_attention"]
    monkeypatch.setattr(model, "can_fuse", lambda device: False)
    assert [attention(chosen) for chosen in (None, masked)] == ["sdpa", "sdpa"]
    with pytest.raises(ConfigError, match=r"^pretrain\.document_attention: .* begun with flex attention"):
        attention(skipping)


@pytest.mark.parametrize("workers", [(4, None, 4), (4, 2, 2)])
def test_the_fewest_workers_are_those_it_may_start_with(workers: tuple[int, int | None, int]) -> None:
    most, least, fewest = workers
    assert Pretrain(workers=most, min_workers=least).fewest_workers == fewest
