"""Reward-augmented decoding (Deng and Raffel, EMNLP 2023, arXiv 2310.09520) as a guide of this package's sampler.

Candidates c for the next token of a text x are the `top_k` likeliest tokens of the model's own nucleus, which are fewer
where that is smaller. One is drawn with the probability

    p(c) ~ exp(z_c / temperature + beta * r(x, c))

r being the reward of the text with the candidate, clamped to [0, 1], the range that it was trained on. The order is
that of the code published with IF-Guide (arXiv 2506.01790): the nucleus is of the model's own distribution, and what
has a reward is not cut again. With `top_p` 1 it is RAD as its paper has it, which draws from all `top_k`.

The reward model is unidirectional, so its keys and values of the text are kept, and a candidate costs one token of it:
the sampled texts' cache is copied for `CANDIDATES` candidates at a time, and dropped. A text costs `top_k` + 1
tokens of the reward model for each of its own.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ifguide.evaluation.reward_model import RewardModel

CANDIDATES = 2048  # rated at once: as many copies of a text's keys and values lie in memory


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """How a model is to be guided: `reward` is the folder of a reward model, `beta` the weight of its rewards, `top_k`
    the number of candidates for a token."""

    reward: str
    beta: float
    top_k: int


@dataclass(frozen=True, kw_only=True)
class RewardGuide:
    """`Guide` of `evaluation.generation`; see the module."""

    model: RewardModel
    beta: float
    top_k: int

    def begin(self, prompt_BT: Tensor, continuations: int) -> GuidedTexts:
        """The texts (B x continuations rows) before their first sampled token."""
        _, cache = self.model(prompt_BT, use_cache=True)
        rows = torch.arange(len(prompt_BT), device=prompt_BT.device).repeat_interleave(continuations)
        return GuidedTexts(self, [_select(cache, part) for part in rows.split(max(1, CANDIDATES // self.top_k))])


class GuidedTexts:
    """Texts being sampled, in parts of rows, with the reward model's cache of each part."""

    def __init__(self, guide: RewardGuide, caches: list[Any]):
        self.guide, self.caches = guide, caches
        self.part = max(1, CANDIDATES // guide.top_k)

    def shift(self, logits_RV: Tensor, top_p: float, temperature: float) -> Tensor:
        """The log-probabilities to draw each row's next token from, (R, V), up to a constant: those of the candidates
        with their rewards, else -inf."""
        own_RV = logits_RV.float() / temperature
        logits_RK, tokens_RK = own_RV.topk(min(self.guide.top_k, own_RV.shape[1]), dim=1)
        logits_RK = logits_RK.masked_fill(~_in_nucleus(logits_RK, own_RV, top_p), -torch.inf)
        rewards = [
            self._rate(cache, tokens) for cache, tokens in zip(self.caches, tokens_RK.split(self.part), strict=True)
        ]
        shifted_RK = logits_RK + self.guide.beta * torch.cat(rewards)
        return torch.full_like(logits_RV, -torch.inf, dtype=shifted_RK.dtype).scatter(1, tokens_RK, shifted_RK)

    def _rate(self, cache: Any, tokens_RK: Tensor) -> Tensor:
        candidates = copy.deepcopy(cache)
        candidates.batch_repeat_interleave(tokens_RK.shape[1])
        rewards_N1, _ = self.guide.model(tokens_RK.reshape(-1, 1), candidates, use_cache=True)
        return rewards_N1.view(tokens_RK.shape).clamp(0, 1)

    def take(self, tokens_R: Tensor) -> None:
        """Each row goes on with its sampled token."""
        parts = zip(self.caches, tokens_R.split(self.part), strict=True)
        self.caches = [self.guide.model(tokens[:, None], cache, use_cache=True)[1] for cache, tokens in parts]


def _in_nucleus(logits_RK: Tensor, logits_RV: Tensor, top_p: float) -> Tensor:
    """Which of the K largest logits, in descending order, are in the nucleus: the sum of greater probabilities is below
    `top_p` (`generation`)."""
    probabilities_RK = (logits_RK.double() - logits_RV.double().logsumexp(dim=1, keepdim=True)).exp()
    before_RK = probabilities_RK.cumsum(dim=1) - probabilities_RK
    first_of_equals_RK = torch.searchsorted(-logits_RK, -logits_RK)
    return before_RK.gather(1, first_of_equals_RK) < top_p


def _select(cache: Any, rows: Tensor) -> Any:
    selected = copy.deepcopy(cache)
    selected.batch_select_indices(rows)
    return selected
