"""A unidirectional reward model: a causal LM's trunk with a linear head, which gives every prefix of a text a reward.

It is the reward model of reward-augmented decoding (Deng and Raffel, EMNLP 2023, arXiv 2310.09520); `methods` trains
it. On disk it is the LM in HF form, whose own head is not used, and `reward_head.safetensors`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ifguide.config import ModelSource
from ifguide.models import load_model

HEAD = "reward_head.safetensors"


class RewardModel(nn.Module):
    """Token ids (B, T) -> the reward of each prefix (B, T), float32: entry [b, j] is of tokens 0..j of text b."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model: Any = model
        # The width that the LM head reads is the trunk's last, also where a projection follows the blocks (OPT-350M).
        width = model.get_output_embeddings().weight.shape[1]
        self.weight, self.bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.tensor(0.5))

    def forward(self, tokens_BT: Tensor, cache: Any = None, *, use_cache: bool = False) -> tuple[Tensor, Any]:
        """(rewards (B, T), the cache that went on from `cache` with these tokens)."""
        output = self.model.base_model(input_ids=tokens_BT, past_key_values=cache, use_cache=use_cache)
        hidden_BTD = output.last_hidden_state.to(torch.promote_types(self.weight.dtype, output.last_hidden_state.dtype))
        return hidden_BTD @ self.weight + self.bias, output.past_key_values

    def save(self, folder: Path) -> None:
        """Write the model's files into `folder`."""
        self.model.save_pretrained(folder)
        save_file({"weight": self.weight.detach().cpu(), "bias": self.bias.detach().cpu()}, folder / HEAD)


def load_reward_model(folder: Path, *, device: str = "cpu") -> RewardModel:
    """What `RewardModel.save` wrote, in eval mode. FileNotFoundError where it did not."""
    if not (folder / HEAD).is_file():
        raise FileNotFoundError(f"{folder} has no {HEAD}: it is not a reward model")
    made = RewardModel(load_model(ModelSource(source=str(folder))))
    with torch.no_grad():
        for name, values in load_file(folder / HEAD).items():
            getattr(made, name).copy_(values)
    return made.to(device).eval()
