"""Tiny random causal LMs and corpora for tests: seeded, on the CPU, with weights large enough to matter."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from ifguide.config import ModelSource
from ifguide.models import linearise, load_model

VOCABULARY = 48
WINDOW = 4
GPT_NEOX: dict[str, Any] = {
    "model_type": "gpt_neox",
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA: dict[str, Any] = {
    **GPT_NEOX,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
GPT2: dict[str, Any] = {**GPT_NEOX, "model_type": "gpt2", "n_inner": 24}
# Heads whose width together is not the model's: as in Qwen3 and Gemma.
WIDE_HEADS: dict[str, Any] = {**LLAMA, "head_dim": 8}
GEMMA: dict[str, Any] = {**WIDE_HEADS, "sliding_window": WINDOW, "query_pre_attn_scalar": 8}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gpt_neox": GPT_NEOX,
    "llama": LLAMA,
    "llama2": {**LLAMA, "num_key_value_heads": 4},
    "llama3": {**LLAMA, "rope_parameters": LLAMA3_ROPE},
    "smollm": {**LLAMA, "tie_word_embeddings": True},
    "mistral": {**LLAMA, "model_type": "mistral", "sliding_window": WINDOW},
    "qwen2": {**LLAMA, "model_type": "qwen2", "use_sliding_window": True, **SLIDING},
    "qwen3": {**WIDE_HEADS, "model_type": "qwen3", "tie_word_embeddings": True},
    "gemma2": {**GEMMA, "model_type": "gemma2", "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma3": {**GEMMA, "model_type": "gemma3_text", **SLIDING},
    "gpt2": GPT2,
    "opt": {**GPT_NEOX, "model_type": "opt", "ffn_dim": 24, "word_embed_proj_dim": 16, "init_std": 0.3},
    "opt_350m": {
        **GPT_NEOX, "model_type": "opt", "ffn_dim": 24, "word_embed_proj_dim": 8, "init_std": 0.3,
        "do_layer_norm_before": False,
    },
    "gpt_neo": {
        **GPT_NEOX, "model_type": "gpt_neo", "num_layers": 2, "num_heads": 2, "window_size": WINDOW,
        "attention_types": [[["global", "local"], 1]],
    },
    "bloom": {**GPT_NEOX, "model_type": "bloom", "n_layer": 2, "n_head": 2},
}  # fmt: skip


def tiny_model(family: str, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """Two linearised layers of width 16 of a family of `ARCHITECTURES`.

    The weights are drawn in float32, so a float64 model is the same function. Biases and norms are random too: HF
    starts them at zero and one, where a wrong treatment could hide.
    """
    model = load_model(ModelSource(architecture=ARCHITECTURES[family]), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    model = linearise(model)
    return _in_float64(model) if dtype == torch.float64 else nn.Module.to(model, dtype)


def _in_float64(model: PreTrainedModel) -> PreTrainedModel:
    """Float64 throughout: HF computes norms and softmaxes in float32 whatever the model's dtype, which would hide
    errors below 1e-7. Buffers (rotary frequencies) stay float32, so that they are the float32 model's constants."""
    for parameter in model.parameters():
        parameter.data = parameter.data.double()
    for module in model.modules():
        # Every module, for a caller may run a part of the model.
        if type(module).__module__.startswith("transformers."):
            module.forward = _without_downcasts(module.forward)
    return model


def _without_downcasts(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def in_float64(*args: Any, **kwargs: Any) -> Any:
        with _KeepFloat64():
            return forward(*args, **kwargs)

    return in_float64


class _KeepFloat64(TorchFunctionMode):
    """Of a float64 tensor, `.float()`, `.to(torch.float32)` and `dtype=torch.float32` leave the dtype."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            args = tuple(torch.float64 if value is torch.float32 else value for value in args)
            kwargs = {key: torch.float64 if value is torch.float32 else value for key, value in kwargs.items()}
        return func(*args, **kwargs)


def random_blocks(rows: int, length: int, *, seed: int = 0, ragged: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """int32 (rows, length) and its lengths: half the rows are shorter if `ragged`, padded with id 0."""
    rng = np.random.default_rng(seed)
    blocks_NT = rng.integers(1, VOCABULARY, size=(rows, length), dtype=np.int32)
    lengths_N = np.full(rows, length, dtype=np.int32)
    if ragged:
        lengths_N[::2] = rng.integers(max(2, length // 2), length, size=len(lengths_N[::2]))
        blocks_NT[np.arange(length) >= lengths_N[:, None]] = 0
    return blocks_NT, lengths_N


def as_tensors(blocks_NT: np.ndarray, lengths_N: np.ndarray) -> tuple[Tensor, Tensor]:
    """The int64 tensors that a model and a scorer take."""
    return torch.from_numpy(blocks_NT.astype(np.int64)), torch.from_numpy(lengths_N.astype(np.int64))
