"""A GPT-NeoX of two layers for the byte tokenizers of `conftest`, and the sentences that one of them knows."""

from __future__ import annotations

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

EOS, BOS = "<|end|>", "<|begin|>"
SENTENCES = ("the cat sat on the mat", "a dog ran to me", "we all like plum pie")


def tiny_model(positions: int = 64) -> GPTNeoXForCausalLM:
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=258,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=positions,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPTNeoXForCausalLM(config)
