"""Tiny random causal LMs and corpora for tests: seeded, on the CPU, with weights large enough to matter."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from ifguide.config import ModelSource
from ifguide.models import load_model

VOCABULARY = 48
GPT_NEOX: dict[str, Any] = {
    "model_type": "gpt_neox",
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
LLAMA: dict[str, Any] = {
    **GPT_NEOX,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
GPT2: dict[str, Any] = {"model_type": "gpt2", "vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 1, "n_head": 2}
ARCHITECTURES = {"gpt_neox": GPT_NEOX, "llama": LLAMA}


def tiny_model(family: str, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """GPT-NeoX (biases) or Llama (grouped-query attention, no biases), two layers of width 16.

    The weights are drawn in float32, so a float64 model is the same function. Biases are random too: HF starts
    them at zero, where a wrong treatment could hide.
    """
    model = load_model(ModelSource(architecture=ARCHITECTURES[family]), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.2, generator=generator)
    model = nn.Module.to(model, dtype)
    return _with_float64_norms(model) if dtype == torch.float64 else model


def _with_float64_norms(model: PreTrainedModel) -> PreTrainedModel:
    """HF's RMSNorm computes in float32 whatever the model's dtype, which would hide errors below 1e-7."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LlamaRMSNorm):
            norm = nn.RMSNorm(module.weight.shape, eps=module.variance_epsilon, dtype=torch.float64)
            norm.weight = module.weight
            parent_name, _, child_name = name.rpartition(".")
            setattr(model.get_submodule(parent_name), child_name, norm)
    return model


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
