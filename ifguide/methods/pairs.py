"""Scored continuations as what preference methods learn from: pairs for DPO, rated texts for a reward model.

A continuation that is shorter than was asked for ended with EOS, and ends with it here too; one that was cut does not,
or a model would learn to stop where the sampler did.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ifguide.methods.reward_model import RatedText


@dataclass(frozen=True, kw_only=True)
class ScoredPrompt:
    """A prompt's tokens, its sampled continuations' tokens before any EOS, and how much of the behaviour each shows."""

    row: int
    prompt: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]
    scores: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A prompt and two continuations of it, as tokens: the chosen one is to become likelier than the rejected one."""

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]


def make_pairs(
    prompts: Sequence[ScoredPrompt], *, per_prompt: int, min_difference: float, max_new_tokens: int, eos: int
) -> list[Pair]:
    """Up to `per_prompt` pairs of each prompt: the i-th lowest score over the i-th highest, `min_difference` apart or
    more. In the order of the prompts; ties by the number of the continuation."""
    pairs = []
    for prompt in prompts:
        order = np.argsort(prompt.scores, kind="stable").tolist()
        ended = [_ended(tokens, max_new_tokens, eos) for tokens in prompt.continuations]
        for low, high in list(zip(order, reversed(order), strict=True))[: min(per_prompt, len(order) // 2)]:
            if prompt.scores[high] - prompt.scores[low] < min_difference:
                break
            pairs.append(Pair(prompt=prompt.prompt, chosen=ended[low], rejected=ended[high]))
    return pairs


def rate_continuations(prompts: Sequence[ScoredPrompt], *, max_new_tokens: int, eos: int) -> list[RatedText]:
    """Every continuation with the reward 1 - score, in order."""
    return [
        RatedText(
            prompt=prompt.prompt, continuation=_ended(tokens, max_new_tokens, eos), reward=min(1.0, max(0.0, 1 - score))
        )
        for prompt in prompts
        for tokens, score in zip(prompt.continuations, prompt.scores, strict=True)
    ]


def _ended(tokens: tuple[int, ...], max_new_tokens: int, eos: int) -> tuple[int, ...]:
    return tokens if len(tokens) == max_new_tokens else (*tokens, eos)
