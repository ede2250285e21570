"""Packed blocks whose documents do not see each other equal each document trained on alone, in float64."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bench.common.step_profile import host_reads
from ifguide.config import ModelSource
from ifguide.documents import begins_document, keeps_documents_apart, positions_in_document
from ifguide.models import load_model
from ifguide.training.batches import Batches
from ifguide.training.blocks import LENGTHS, MASKED, STARTS, TOKENS, TrainingBlocks
from ifguide.training.lm_loss import LanguageModelLoss, Loss
from ifguide.training.objective import Objective
from ifguide.training.schedule import Schedule
from tests.tiny import ARCHITECTURES, GPT_NEOX, VOCABULARY, tiny_model

BLOCK_SIZE, BLOCKS = 12, 3
STREAM = 30  # tokens: the last block is filled up
STARTS_OF_DOCUMENTS = (0, 5, 6, 12, 20, 27)  # one of a single token, one at a block's edge, one over an edge
UNABLE = {"opt", "opt_350m", "bloom"}  # their masks do not ask for documents
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64,
}  # fmt: skip
UNABLE_TOO: dict[str, dict[str, Any]] = {
    "gpt_oss": {**SHAPE, "model_type": "gpt_oss", "num_local_experts": 4, "num_experts_per_tok": 2},
    "lfm2": {**SHAPE, "model_type": "lfm2", "layer_types": ["conv", "full_attention"]},  # its convolutions run on
    "xglm": {**GPT_NEOX, "model_type": "xglm", "d_model": 16, "num_layers": 2, "attention_heads": 2, "ffn_dim": 24},
}
EXPERTS = {
    **SHAPE, "model_type": "qwen3_moe", "num_hidden_layers": 12, "num_experts": 8, "num_experts_per_tok": 2,
    "moe_intermediate_size": 64, "initializer_range": 1.0,
}  # fmt: skip


@pytest.fixture
def blocks(tmp_path: Path) -> TrainingBlocks:
    rng = np.random.default_rng(0)
    tokens = rng.integers(VOCABULARY, size=(BLOCKS, BLOCK_SIZE), dtype=np.int32)
    np.save(tmp_path / TOKENS, tokens)
    np.save(tmp_path / LENGTHS, np.array([12, 12, 6], dtype=np.int32))
    np.save(tmp_path / MASKED, rng.random(tokens.shape) < 0.3)
    np.save(tmp_path / STARTS, np.array(STARTS_OF_DOCUMENTS, dtype=np.int64))
    return TrainingBlocks(tmp_path)


def pieces() -> list[tuple[int, int]]:
    """Half-open spans of the stream that are one document in one block."""
    edges = sorted({*STARTS_OF_DOCUMENTS, *range(0, STREAM, BLOCK_SIZE), STREAM})
    return list(itertools.pairwise(edges))


def batch_of(blocks: TrainingBlocks) -> list[torch.Tensor]:
    schedule = Schedule(num_blocks=BLOCKS, batch_blocks=BLOCKS, epochs=1, seed=0)
    batches = Batches(
        blocks, schedule, np.arange(BLOCKS), rank=0, world_size=1, micro_batch_blocks=BLOCKS,
        device=torch.device("cpu"), ahead=False,
    )  # fmt: skip
    (batch,) = batches.of_step(0)
    return list(batch)


def gradients(module: LanguageModelLoss) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return found


@pytest.mark.parametrize("family", sorted(set(ARCHITECTURES) - UNABLE))
def test_a_packed_block_equals_each_of_its_documents_alone(family: str, blocks: TrainingBlocks) -> None:
    module = LanguageModelLoss(tiny_model(family, dtype=torch.float64).eval(), Objective(penalty=0.7), chunk_tokens=5)
    tokens, lengths, masked, count, documents = batch_of(blocks)
    packed = Loss(*module(tokens, lengths, masked, count, documents))
    packed.loss.backward()
    found = gradients(module)

    stream = torch.from_numpy(blocks.tokens.reshape(-1).astype(np.int64))
    masks = torch.from_numpy(blocks.masked.reshape(-1).copy())
    assert count == sum(stop - start - 1 for start, stop in pieces())
    total = torch.zeros((), dtype=torch.float64)
    for start, stop in pieces():
        alone = stream[None, start:stop], torch.tensor([stop - start]), masks[None, start:stop]
        total = total + Loss(*module(*alone, count)).loss
    total.backward()
    torch.testing.assert_close(packed.loss, total, rtol=1e-12, atol=1e-12)
    for name, expected in gradients(module).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-12)

    together = Loss(*module(tokens, lengths, masked, count))
    assert not torch.isclose(together.loss, packed.loss, rtol=1e-4)


@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_a_family_without_it_is_refused_by_name(family: str) -> None:
    module = LanguageModelLoss(tiny_model(family), Objective())
    if family in UNABLE:
        with pytest.raises(ValueError, match=r"^pretrain\.document_attention: (OPT|Bloom)ForCausalLM lets documents"):
            module.check(documents=True)
    else:
        module.check(documents=True)
    module.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", sorted(UNABLE | UNABLE_TOO.keys()))
def test_it_is_refused_whatever_the_weights_and_precision(family: str, dtype: torch.dtype) -> None:
    """At its family's own small initial weights a model's loss says nothing: it is that of no knowledge."""
    fields = {**ARCHITECTURES, **UNABLE_TOO}[family]
    plain = {name: value for name, value in fields.items() if name not in ("initializer_range", "init_std")}
    for seed in range(4):
        model = load_model(ModelSource(architecture=plain), seed=seed)
        module = LanguageModelLoss(nn.Module.to(model, dtype), Objective()).train()
        with pytest.raises(ValueError, match=r"^pretrain\.document_attention: "):
            module.check(documents=True)
        assert all(part.training for part in module.modules())


def test_rounding_in_experts_is_not_taken_for_sight() -> None:
    """What an expert makes of a token depends, in the last bits, on how many others it is given."""
    model = load_model(ModelSource(architecture=EXPERTS))
    LanguageModelLoss(model, Objective()).check(documents=True)
    assert keeps_documents_apart(model)


def test_positions_that_run_on_are_not_those_of_a_document_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("gpt2")
    assert keeps_documents_apart(model)
    monkeypatch.setattr("ifguide.documents.positions_in_document", lambda document_BT: torch.arange(8)[None])
    assert not keeps_documents_apart(model)


def test_documents_positions_and_counts_are_those_of_the_stream(blocks: TrainingBlocks) -> None:
    tokens, lengths, _, count, documents = batch_of(blocks)
    shown = {
        tuple(row.tolist()): place for place, row in enumerate(torch.from_numpy(blocks.tokens[:].astype(np.int64)))
    }
    for row, length, document, position in zip(
        tokens, lengths, documents, positions_in_document(documents), strict=True
    ):
        block = shown[tuple(row.tolist())]
        for j in range(int(length)):
            place = block * BLOCK_SIZE + j
            start = max(start for start, stop in pieces() if start <= place)
            assert position[j] == place - start
            assert document[j] == sum(first <= place for first in STARTS_OF_DOCUMENTS)
    predicted = (torch.arange(BLOCK_SIZE) < lengths[:, None]) & ~begins_document(documents)
    assert predicted.sum() == count == blocks.predicted_tokens(np.arange(BLOCKS))
    assert blocks.predicted_tokens(np.array([-1, 0])) == 5 - 1 + 0 + 6 - 1


def test_nothing_is_read_on_the_host(blocks: TrainingBlocks) -> None:
    module = LanguageModelLoss(tiny_model("gpt_neox"), Objective())
    batch = batch_of(blocks)
    assert not host_reads(lambda: module(*batch)[0])
