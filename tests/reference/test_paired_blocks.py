"""Directions of the upper blocks alone: pairs of streams that begin there give the scores of the whole pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ifguide.influence import difference, paired_blocks
from ifguide.influence.fused import can_fuse
from ifguide.influence.method import Method
from ifguide.influence.paired_blocks import first_block
from ifguide.influence.scorer import TokenScorer
from tests.reference.test_influence import random_directions
from tests.tiny import ARCHITECTURES, as_tensors, random_blocks, tiny_model

FIRST, LAYERS, LENGTH = 2, 4, 12
FLOAT32 = Method(engine="difference", precision="float32", rank=None)
OTHERS = {
    "low_rank": Method(engine="difference", precision="float32", rank=3),
    "bfloat16": Method(engine="difference", precision="bfloat16", rank=None),
}


def model_of(family: str, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Four layers of a family."""
    deeper: dict[str, Any] = {**ARCHITECTURES[family], "num_hidden_layers": LAYERS}
    deeper |= {"num_layers": LAYERS, "attention_types": [[["global", "local"], 2]]} if family == "gpt_neo" else {}
    if "layer_types" in deeper:
        deeper["layer_types"] = 2 * deeper["layer_types"]
    monkeypatch.setitem(ARCHITECTURES, family, deeper)
    return tiny_model(family, dtype=dtype)


def upper(model: PreTrainedModel, directions: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: V for name, V in directions.items() if first_block(model, [name]) >= FIRST}


def with_zeros(model: PreTrainedModel, directions: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same direction over all blocks."""
    return {name: V if first_block(model, [name]) >= FIRST else torch.zeros_like(V) for name, V in directions.items()}


def documents_of(tokens_BT: Tensor, apart: bool) -> Tensor | None:
    numbers = torch.tensor([0] * 5 + [1] * 4 + [2] * (LENGTH - 9))
    return numbers.expand_as(tokens_BT) + torch.arange(len(tokens_BT))[:, None] if apart else None


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("beginning", [None, 1])
@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_in_float64_they_are_the_whole_engines_with_zeros_below_and_the_exact_engines(
    family: str, beginning: int | None, apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(family, monkeypatch, torch.float64)
    directions, options = random_directions(model), {"attribution": "target", "beginning": beginning}
    tokens_BT, lengths_B = as_tensors(*random_blocks(3, LENGTH))
    document_BT = documents_of(tokens_BT, apart)
    suffix, zeroed = upper(model, directions), with_zeros(model, directions)
    whole = TokenScorer(model, zeroed, method=FLOAT32, **options)
    begun = TokenScorer(model, suffix, method=FLOAT32, steps=whole.steps, **options)
    exact = TokenScorer(model, suffix, **options)
    scores_BT = begun.score(tokens_BT, lengths_B, document_BT)
    assert error(scores_BT, whole.score(tokens_BT, lengths_B, document_BT)) < 1e-11
    assert error(scores_BT, exact.score(tokens_BT, lengths_B, document_BT)) < 1e-4  # of steps, not of rounding
    if beginning is None and not apart:
        assert begun.steps == TokenScorer(model, suffix, method=FLOAT32, **options).steps


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_every_family_begins_there_and_reads_the_same_states(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(family, monkeypatch)
    directions, (tokens_BT, lengths_B) = random_directions(model), as_tensors(*random_blocks(3, LENGTH))
    own, other = upper(model, directions), {name: V.flip(0) for name, V in upper(model, directions).items()}
    begun = TokenScorer(model, [own, other], attribution="target", method=FLOAT32)
    whole = TokenScorer(
        model, [with_zeros(model, directions), {**with_zeros(model, directions), **other}], attribution="target",
        method=FLOAT32, steps=begun.steps,
    )  # fmt: skip
    layers, places = (1, FIRST, FIRST + 1, LAYERS), lengths_B[:, None] > torch.arange(LENGTH)
    passes = [scorer.score_and_read(tokens_BT, lengths_B, layers, tangents=True) for scorer in (begun, whole)]
    assert error(passes[0].scores_KBT, passes[1].scores_KBT) < 1e-3
    for found, expected in zip(passes[0].states, passes[1].states, strict=True):
        assert error(found[places], expected[places]) < 1e-5
    tangents = [one.tangents_KBTD for one in passes]
    assert tangents[0] is not None
    assert tangents[1] is not None
    assert error(tangents[0][:, places], tangents[1][:, places]) < 1e-2


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("method", OTHERS)
@pytest.mark.parametrize("family", ["gpt_neox", "llama", "gemma2"])
def test_in_low_rank_and_precision_they_are_as_near_to_the_exact_ones_as_those_of_the_whole_pass(
    family: str, method: str, apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(family, monkeypatch)
    directions, (tokens_BT, lengths_B) = random_directions(model), as_tensors(*random_blocks(4, LENGTH))
    document_BT = documents_of(tokens_BT, apart)
    scores = [
        TokenScorer(model, V, attribution="target", method=OTHERS[method]).score(tokens_BT, lengths_B, document_BT)
        for V in (upper(model, directions), with_zeros(model, directions))
    ]
    assert error(*scores) < (1e-3 if method == "low_rank" else 0.1)
    exact = TokenScorer(model, upper(model, directions), attribution="target").score(tokens_BT, lengths_B, document_BT)
    if method == "bfloat16":
        assert error(scores[0], exact) < 1.5 * error(scores[1], exact) + 0.01


def test_a_direction_of_all_blocks_runs_as_it_did(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama", monkeypatch)
    directions, (tokens_BT, lengths_B) = random_directions(model), as_tensors(*random_blocks(3, LENGTH))
    scores_BT = TokenScorer(model, directions, attribution="target", method=FLOAT32).score(tokens_BT, lengths_B)
    monkeypatch.setattr(difference, "first_block", lambda *_: 0)
    monkeypatch.setattr(difference, "paired_blocks", None)
    again = TokenScorer(model, directions, attribution="target", method=FLOAT32).score(tokens_BT, lengths_B)
    assert torch.equal(scores_BT, again)


def test_blocks_below_read_each_row_once_and_the_model_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama", monkeypatch)
    tokens_BT, lengths_B = as_tensors(*random_blocks(3, LENGTH))
    scorer = TokenScorer(model, upper(model, random_directions(model)), attribution="target", method=FLOAT32)
    rows: list[int] = []
    hooks = [
        block.register_forward_hook(lambda module, inputs, output: rows.append(len(output))) for block in scorer.blocks
    ]
    scorer.score(tokens_BT, lengths_B)
    for hook in hooks:
        hook.remove()
    assert rows == [3, 3, 6, 6]
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_block_whose_forward_someone_else_replaced_keeps_that(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama", monkeypatch, torch.float64)
    before = [vars(module).get("forward") for module in model.modules()]
    assert any(before)
    scorer = TokenScorer(model, upper(model, random_directions(model)), attribution="target", method=FLOAT32)
    scorer.score(*as_tensors(*random_blocks(3, LENGTH)))
    assert [vars(module).get("forward") for module in model.modules()] == before


def test_an_argument_that_is_not_known_to_have_rows_is_refused() -> None:
    class Block(nn.Module):
        def forward(self, hidden_states: Tensor, alibi: Tensor | None = None) -> Tensor:
            return hidden_states if alibi is None else hidden_states + alibi

    block, states = Block(), torch.ones(2, 3, 4)
    forward = paired_blocks.paired_blocks([block], {}, 2, torch.no_grad)[block]
    assert forward(states, None).shape == (4, 3, 4)
    with pytest.raises(ValueError, match="Block: not known whether its argument alibi has a row"):
        forward(states, torch.ones(2, 3, 4))


def test_a_module_outside_the_blocks_lets_pairs_begin_with_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama", monkeypatch)
    assert first_block(model, ["model.layers.3.mlp.up_proj", "model.layers.2.mlp.up_proj"]) == FIRST
    assert first_block(model, ["model.layers.3.mlp.up_proj", "lm_head"]) == 0


@pytest.mark.slow
@pytest.mark.skipif(not can_fuse(torch.device("cpu")), reason="no compiler")
@pytest.mark.parametrize("apart", [False, True])
def test_compiled_layers_give_the_same_scores(apart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama", monkeypatch)
    directions, (tokens_BT, lengths_B) = random_directions(model), as_tensors(*random_blocks(3, LENGTH))
    document_BT = documents_of(tokens_BT, apart)
    scores = [
        TokenScorer(
            model, upper(model, directions), attribution="target",
            method=Method(engine="difference", precision="bfloat16", rank=None, fused=fused),
        ).score(tokens_BT, lengths_B, document_BT)
        for fused in (True, False)
    ]  # fmt: skip
    assert error(*scores) < 0.1
