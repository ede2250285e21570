"""How a causal LM's logits come from its final hidden states: z = f(W h + b), one reading for scores and for training.

f is the identity, a scale (Cohere, Granite, Falcon-H1) or a soft cap c tanh(z / c) (Gemma 2, RecurrentGemma). Whoever
needs logits takes them in chunks of positions: no (tokens, vocabulary) tensor need ever be whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

MULTIPLIED = ("hyperclovax",)  # families whose `logits_scaling` multiplies; all others' divides


@dataclass(frozen=True, kw_only=True)
class LMHead:
    """f: `scale` times, then the soft cap, if any."""

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> LMHead:
        """As the model's config says."""
        config = model.config.get_text_config()
        scale = 1.0
        for name in ("logit_scale", "lm_head_multiplier"):
            scale *= float(getattr(config, name, None) or 1.0)
        scaling = float(getattr(config, "logits_scaling", None) or 1.0)
        return cls(
            scale=scale * scaling if config.model_type in MULTIPLIED else scale / scaling,
            softcap=getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None),
        )

    @property
    def is_linear(self) -> bool:
        """Whether logits are W h + b as they are."""
        return self.scale == 1.0 and self.softcap is None

    def activate(self, linear_NV: Tensor) -> tuple[Tensor, Tensor | None]:
        """f of W h + b (N, V), at least float32 and in place where it is that already; and f' / `scale`, where that is
        not 1."""
        logits_NV = linear_NV.to(torch.promote_types(linear_NV.dtype, torch.float32))
        if self.scale != 1.0:
            logits_NV = logits_NV.mul_(self.scale)
        if self.softcap is None:
            return logits_NV, None
        tanh_NV = logits_NV.div_(self.softcap).tanh_()
        return self.softcap * tanh_NV, 1 - tanh_NV.square()


def output_embedding(model: PreTrainedModel) -> nn.Linear:
    """W and b. Raises ValueError when the model's LM head is no `nn.Linear`."""
    linear = model.get_output_embeddings()
    if not isinstance(linear, nn.Linear):
        raise ValueError(f"{type(model).__name__}: its LM head is a {type(linear).__name__}, not an nn.Linear")
    return linear


def not_understood(model: PreTrainedModel, role: str) -> ValueError:
    """The error about a `role` (proxy, target) whose logits are not f(W h + b)."""
    return ValueError(
        f"{type(model).__name__}: its logits are not its output embedding times the hidden state, up to a scale or soft"
        f" cap; choose a {role} of a common family (GPT-NeoX, Llama, Qwen, Gemma, ...)"
    )


def chunks(tokens: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` positions, in order."""
    return (slice(start, min(start + size, tokens)) for start in range(0, tokens, size))
