"""Compiled layers and kernels: the scores of uncompiled ones up to rounding, and the same bits whatever came before."""

import pytest
import torch
from torch import Tensor

from ifguide.influence.agreement import compare
from ifguide.influence.fused import can_fuse, compiled_layers, kernels
from ifguide.influence.method import Method
from ifguide.influence.scorer import TokenScorer
from ifguide.models import predicted_positions
from tests.reference.test_influence import random_directions
from tests.tiny import ARCHITECTURES, as_tensors, random_blocks, tiny_model

needs_compiler = pytest.mark.skipif(not can_fuse(torch.device("cpu")), reason="no C++ compiler on this machine")


def method(*, fused: bool) -> Method:
    return Method(engine="difference", precision="bfloat16", rank=None, fused=fused)


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_every_layer_of_a_family_is_compiled(family: str) -> None:
    assert len(compiled_layers(tiny_model(family), of_streams=True)) == 2


@needs_compiler
@pytest.mark.parametrize("family", ["gpt_neox", "gemma2"])  # biases; grouped heads, soft caps, sliding window
def test_compiled_kernels_score_as_the_uncompiled_do(family: str) -> None:
    model = tiny_model(family)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data *= 0.5
    directions = [random_directions(model), random_directions(model, seed=5)]
    tokens_BT, lengths_B = as_tensors(*random_blocks(3, 24))
    document_BT = torch.arange(24).expand(3, -1) // 9 if family == "gpt_neox" else None  # a mask goes into the graph
    read = tokens_BT, lengths_B, document_BT
    predicted = predicted_positions(*read)
    plain, fused = (
        TokenScorer(model, directions, attribution="target", method=method(fused=fused)).score(*read)
        for fused in (False, True)
    )
    exact = TokenScorer(model, directions, attribution="target").score(*read)
    for k in range(2):
        assert compare(fused[k], plain[k], predicted).correlation > 0.9995
        assert compare(fused[k], exact[k], predicted).correlation > 0.99


@pytest.mark.slow
@needs_compiler
def test_bits_do_not_depend_on_the_sizes_that_were_compiled_first() -> None:
    # Lowering a graph takes 5 s and more: two sizes, which differ in batch and length, and one direction.
    model = tiny_model("gpt_neox")
    directions = random_directions(model)
    tokens_BT, lengths_B = as_tensors(*random_blocks(3, 33))
    wanted = [(slice(0, 1), 24), (slice(1, 3), 33)]

    def scored(order: list[int]) -> list[Tensor]:
        torch._dynamo.reset()
        kernels.cache_clear()
        # Every graph is lowered anew; the C++ compiler alone is spared the very source that it has compiled before.
        with (
            torch._inductor.config.patch(fx_graph_cache=False),
            torch._functorch.config.patch(enable_autograd_cache=False),
        ):
            scorer = TokenScorer(model, directions, attribution="target", method=method(fused=True), steps=[2.0**-9])
            scores = {i: scorer.score(tokens_BT[wanted[i][0], : wanted[i][1]], lengths_B[wanted[i][0]]) for i in order}
        return [scores[i] for i in range(len(wanted))]

    for first, second in zip(scored([0, 1]), scored([1, 0]), strict=True):
        assert torch.equal(first, second)
