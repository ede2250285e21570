"""A student's reader of the proxy is cast to bfloat16 in its weights alone."""

from __future__ import annotations

import torch

from ifguide.student.scorers import in_bfloat16
from tests.tiny import tiny_model


def test_frequencies_of_positions_stay_in_float32() -> None:
    model = in_bfloat16(tiny_model("llama"))
    assert {weights.dtype for weights in model.parameters()} == {torch.bfloat16}
    kept = {name: buffer.dtype for name, buffer in model.named_buffers() if "inv_freq" in name}
    assert kept
    assert set(kept.values()) == {torch.float32}
    tokens = torch.arange(8)[None]
    assert torch.isfinite(model(tokens).logits).all()
