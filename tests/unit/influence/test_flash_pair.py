"""The GPU's attention kernel, and the engine around it with compiled layers; without a GPU, Triton interprets it."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ifguide.influence import fused
from ifguide.influence.agreement import compare
from ifguide.influence.method import Method
from ifguide.influence.scorer import TokenScorer
from ifguide.models import predicted_positions
from tests.reference.test_influence import random_directions
from tests.tiny import as_tensors, random_blocks, tiny_model

pytest.importorskip("triton", reason="Triton is not installed (it is for Linux on x86-64 alone)")
ON_GPU = torch.cuda.is_available()
TOLERANCE = 5e-3 if ON_GPU else 1e-5  # of bfloat16 and float32 products
Attend = Callable[[Tensor, Tensor, Tensor, float | None], Tensor]


@pytest.fixture
def flash_pair() -> Attend:
    """The kernel; interpreted, in float32 whatever its inputs: the interpreter cannot multiply bfloat16."""
    from ifguide.influence.flash_pair import flash_pair

    if ON_GPU:
        return lambda q, k, v, softcap: flash_pair(*(x.cuda().bfloat16() for x in (q, k, v)), softcap).to(q)
    return lambda q, k, v, softcap: flash_pair(q.float(), k.float(), v.float(), softcap).to(q)


def whole_attention(q: Tensor, k: Tensor, v: Tensor, softcap: float | None) -> Tensor:
    """The values and changes in float64, by forward-mode differentiation of the textbook formula."""
    q, k, v = q.double(), *(x.double().repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    visible = torch.ones(q.shape[3], q.shape[3], dtype=torch.bool).tril()

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logits = q @ k.mT
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return logits.masked_fill(~visible, -torch.inf).softmax(dim=-1) @ v

    changes = [torch.func.jvp(attention, (q[0], k[0], v[0]), (q[i], k[i], v[i]))[1] for i in range(1, len(q))]
    return torch.stack([attention(q[0], k[0], v[0]), *changes]).transpose(2, 3)


@pytest.mark.parametrize(
    ("directions", "heads", "key_heads", "length", "width", "softcap"),
    [
        (1, 2, 2, 200, 64, None),
        (2, 4, 2, 70, 16, 5.0),
        (1, 3, 1, 129, 80, None),
        (1, 1, 1, 66, 160, 30.0),
        (1, 1, 1, 1, 8, None),
    ],
)
def test_it_is_the_derivative_of_attention(
    flash_pair: Attend, directions: int, heads: int, key_heads: int, length: int, width: int, softcap: float | None
) -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(count: int) -> Tensor:
        return torch.randn(1 + directions, 2, count, length, width, generator=generator)

    q, k, v = 0.3 * normal(heads), normal(key_heads), normal(key_heads)
    q[..., 0] += 2  # logits and changes with a large part in common
    k[..., 0] += 2
    q, k, v = (x.bfloat16().float() for x in (q, k, v))
    found, expected = flash_pair(q, k, v, softcap), whole_attention(q, k, v, softcap)
    for i in range(1 + directions):
        assert (found[i] - expected[i]).norm() < TOLERANCE * expected[i].norm().clamp(min=1e-3)


@pytest.mark.skipif(not fused.can_fuse(torch.device("cpu")), reason="no C++ compiler on this machine")
@pytest.mark.parametrize(
    ("family", "count", "rank"),
    [("gpt_neox", 2, None), ("gemma2", 1, None), ("llama", 1, 4)],  # gemma2: soft caps, and two kinds of layers
)
def test_compiled_layers_score_as_exact_ones(
    flash_pair: Attend, monkeypatch: pytest.MonkeyPatch, family: str, count: int, rank: int | None
) -> None:
    if not ON_GPU:
        as_there = replace(fused.kernels(fused=True, device_type="cpu"), mix=fused.mix_by_sign, flash=flash_pair)
        monkeypatch.setattr("ifguide.influence.difference.kernels", lambda **_: as_there)
    model = tiny_model(family).to("cuda" if ON_GPU else "cpu")
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data *= 0.5
    directions = [random_directions(model, seed=seed) for seed in range(count)]
    tokens_BT, lengths_B = as_tensors(*random_blocks(3, 24))
    exact, compiled = (
        TokenScorer(
            model,
            directions,
            attribution="target",
            method=Method(engine=engine, precision=precision, rank=rank, fused=engine == "difference"),
        )
        for engine, precision in (("forward", "float32"), ("difference", "bfloat16"))
    )
    scores_KBT = compiled.score(tokens_BT, lengths_B)
    predicted = predicted_positions(tokens_BT, lengths_B).to(model.device)
    for found, expected in zip(scores_KBT, exact.score(tokens_BT, lengths_B), strict=True):
        assert compare(found, expected, predicted).correlation > 0.999
    # Fewer blocks are padded to the size that was compiled: the same bits, and no layer is compiled. (The softmax of
    # attention in chunks is a kernel with a variant for its second call.)
    second = compiled.score(tokens_BT[:2], lengths_B[:2], usual_blocks=3)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(compiled.score(tokens_BT[:1], lengths_B[:1], usual_blocks=3), scores_KBT[:, :1])
    assert torch.equal(second, scores_KBT[:, :2])
