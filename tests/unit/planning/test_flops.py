"""FLOP of scoring against those that torch counts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ifguide.influence.method import PRESETS, Method
from ifguide.planning import flops
from ifguide.shapes import shape_of_fields
from tests.tiny import ARCHITECTURES, random_blocks, tiny_model

TOKENS = 12


def _packed_flops(x_shape: tuple[int, ...], *_: object, out_shape: tuple[int, ...], **__: object) -> int:
    """Of a product with a packed matrix, which torch does not count by itself."""
    return 2 * x_shape[0] * x_shape[1] * out_shape[-1]


def _added_flops(_: object, x_shape: tuple[int, ...], matrix_shape: tuple[int, ...], **__: object) -> int:
    """Of a product that is added in place, which torch does not count either."""
    return 2 * x_shape[0] * x_shape[1] * matrix_shape[1]


UNCOUNTED = {torch.ops.aten.addmm_: _added_flops, torch.ops.mkldnn._linear_pointwise: _packed_flops}


@pytest.mark.parametrize("behaviours", [1, 3])
@pytest.mark.parametrize("method", [PRESETS["fast"], PRESETS["exact"], Method(engine="difference", precision="float32",
                         rank=None), Method(engine="difference", precision="bfloat16", rank=4)], ids=str)  # fmt: skip
def test_scoring_is_counted_as_torch_counts_it(method: Method, behaviours: int) -> None:
    from ifguide.influence.scorer import TokenScorer

    shape = shape_of_fields("tiny", "test", ARCHITECTURES["gpt_neox"])
    model = tiny_model("gpt_neox")
    generator = torch.Generator().manual_seed(0)
    directions = [
        {name: torch.randn(out, inner, generator=generator) for name, (out, inner) in
         zip(shape.module_names, shape.linears, strict=True)}
        for _ in range(behaviours)
    ]  # fmt: skip
    method = replace(method, fused=False)  # the counter cannot look into compiled layers
    scorer = TokenScorer(model, directions, attribution="target", method=method)
    tokens = torch.from_numpy(random_blocks(2, TOKENS, ragged=False)[0]).long()
    with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
        scorer.score(tokens, torch.full((2,), TOKENS))
    counts = counter.get_flop_counts()["Global"]
    products = sum(
        count
        for op, count in counts.items()
        if any(name in str(op) for name in ("mm", "linear")) and "bmm" not in str(op)
    )
    without_attention = flops.scoring(shape, 0, attribution="target", method=method, behaviours=behaviours)
    assert products == pytest.approx(2 * TOKENS * without_attention, rel=0.12)  # the first layer has no tangent


def test_a_gauss_newton_product_is_counted_as_torch_counts_it() -> None:
    from ifguide.influence.refinement import GaussNewton

    shape, model = shape_of_fields("tiny", "test", ARCHITECTURES["gpt_neox"]), tiny_model("gpt_neox")
    names = list(shape.module_names)
    tokens = torch.from_numpy(random_blocks(2, TOKENS, ragged=False)[0]).long()
    product = GaussNewton(model, names, [{"input_ids": tokens, "lengths": torch.full((2,), TOKENS)}])
    vector = {name: torch.ones(out, inner) for name, (out, inner) in zip(names, shape.linears, strict=True)}
    with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
        product(vector)
    counts = counter.get_flop_counts()["Global"]
    products = sum(
        count
        for op, count in counts.items()
        if any(name in str(op) for name in ("mm", "linear")) and "bmm" not in str(op)
    )
    assert products == pytest.approx(2 * TOKENS * flops.gauss_newton(shape, 0), rel=0.15)
