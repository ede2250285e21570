"""Nucleus sampling of many continuations of many prompts, without padding, the same on any number of workers.

Prompts of one token length share a batch, so nothing is padded; a prompt is encoded once, and its key-value cache is
repeated for its continuations. The next token x of a row with probabilities p is drawn by rejection,

    x ~ p,   accept if   sum of p over { y : p[y] > p[x] }  <  top_p,

which is the nucleus distribution exactly and needs no sort: at least `top_p` of the draws are accepted. A row that
rejects `ATTEMPTS` draws takes its token from its sorted nucleus, with a further uniform.

Each continuation has random numbers of its own, from (seed, prompt id, number of the continuation): a Philox stream of
`UNIFORMS` a token. So batch, shard, worker and the number of continuations do not decide what is sampled, except
that matrix products of other shapes round differently, which moves a token with a probability of about 1e-6.

Cost: one forward pass over the prompt and k passes of max_new_tokens cached steps, plus three passes over the
vocabulary a token. It does not pad, search beams, or read the checkpoint's generation defaults.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ifguide.models import max_positions
from ifguide.tokenizer import beginning_token

log = logging.getLogger(__name__)

ATTEMPTS = 4
UNIFORMS = ATTEMPTS + 1  # of each token: its draws, and one for the sorted nucleus
CHUNK_BYTES = {"cpu": 4 << 20, "cuda": 1 << 30}  # of probabilities at a time: a core's cache; a share of the memory


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How continuations are drawn. ValueError on settings out of range."""

    continuations: int
    max_new_tokens: int
    top_p: float
    temperature: float
    seed: int

    def __post_init__(self) -> None:
        if self.continuations < 1 or self.max_new_tokens < 1:
            raise ValueError("continuations and max_new_tokens must be at least 1")
        if not 0 < self.top_p <= 1 or not self.temperature > 0:
            raise ValueError(f"need 0 < top_p <= 1 and temperature > 0, got {self.top_p} and {self.temperature}")


class GuidedRows(Protocol):
    """Rows being sampled under a guide."""

    def shift(self, logits_RV: Tensor, top_p: float, temperature: float) -> Tensor:
        """The logits to draw each row's next token from, (R, V), given the model's; -inf rules a token out. What is
        left is drawn from as it is: the nucleus and the temperature are the guide's to apply."""

    def take(self, tokens_R: Tensor) -> None:
        """Each row's sampled token."""


class Guide(Protocol):
    """What changes a model's logits while it is sampled from (`evaluation.reward_decoding`)."""

    def begin(self, prompt_BT: Tensor, continuations: int) -> GuidedRows:
        """B x continuations rows, those of a prompt together, before their first token."""


def sample_continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    continuations: int,
    max_new_tokens: int,
    top_p: float,
    temperature: float,
    seed: int,
    batch_size: int,
    prompt_ids: Sequence[int] | None = None,
    special_tokens: bool = False,
) -> list[list[str]]:
    """The texts of `sample_tokens`: `continuations` for each prompt, in the order of `prompts`, without the prompt."""
    sampling = Sampling(
        continuations=continuations, max_new_tokens=max_new_tokens, top_p=top_p, temperature=temperature, seed=seed
    )
    sampled = sample_tokens(
        model,
        tokenizer,
        prompts,
        sampling,
        batch_size=batch_size,
        prompt_ids=prompt_ids,
        special_tokens=special_tokens,
    )
    return [decode(tokenizer, rows) for rows in sampled]


def sample_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    batch_size: int,
    prompt_ids: Sequence[int] | None = None,
    guide: Guide | None = None,
    special_tokens: bool = False,
) -> list[list[list[int]]]:
    """Per prompt its sampled continuations as token ids, cut before the first EOS; `guide` shifts the logits.

    `batch_size` counts sequences (prompts times continuations); a batch holds at least one prompt. `prompt_ids`
    (default: 0, 1, 2, ...) name the prompts for the random numbers: the same in every shard. Torch's random state is
    neither used nor changed, and the model's mode is given back.

    Prompts are encoded without special tokens, as documents are packed, but a special token's name in one is that
    token. One of no tokens becomes the EOS that precedes a document. With
    `special_tokens` they get those of the tokenizer, and one of no tokens becomes its BOS (else EOS): for a model that
    was trained so. A prompt longer than the model's positions less `max_new_tokens` keeps its end; their count is
    logged. ValueError on settings out of range and on logits that are not finite."""
    if batch_size < 1:
        raise ValueError("batch_size must be at least 1")
    ids = list(range(len(prompts))) if prompt_ids is None else list(prompt_ids)
    if len(ids) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts but {len(ids)} prompt_ids")
    encoded = encode_prompts(model, tokenizer, prompts, sampling.max_new_tokens, special_tokens=special_tokens)
    sampled: list[list[list[int]]] = [[] for _ in prompts]
    with evaluating(model):
        for batch in _equal_length_batches(encoded, max(1, batch_size // sampling.continuations)):
            prompt_BT = torch.tensor([encoded[i] for i in batch], device=model.device)
            uniforms = _uniforms(sampling, [ids[i] for i in batch])
            rows = _sample_batch(model, prompt_BT, uniforms, sampling, tokenizer.eos_token_id, guide)
            for place, index in enumerate(batch):
                first = place * sampling.continuations
                sampled[index] = rows[first : first + sampling.continuations]
    return sampled


def decode(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]]) -> list[str]:
    """The text of each row of token ids, without special tokens."""
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    return [str(tokenizer.decode(list(tokens), **options)) for tokens in rows]


def token_lengths(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], *, special_tokens: bool = False
) -> list[int]:
    """How many tokens each prompt has: prompts of one length share batches, so shards are best cut along it."""
    if not len(prompts):
        return []
    return [len(ids) for ids in tokenizer(list(prompts), add_special_tokens=special_tokens)["input_ids"]]


def encode_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int,
    *,
    special_tokens: bool = False,
) -> list[list[int]]:
    """Token ids of each prompt as `sample_tokens` takes them: never empty, and short enough to be continued."""
    room = max_positions(model) - max_new_tokens
    if room < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} leaves no room for a prompt in this model")
    encoded: list[list[int]] = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in prompts]
    bos = beginning_token(tokenizer) if special_tokens else None
    begun = [] if bos is None or room == 1 else [bos]
    has_start = special_tokens and tokenizer.bos_token_id is not None
    start = tokenizer.bos_token_id if has_start else tokenizer.eos_token_id
    if start is None and not all(encoded):
        raise ValueError("a prompt has no tokens and the tokenizer has no BOS or EOS to start from")
    room -= len(begun)
    overlong = sum(len(ids) > room for ids in encoded)
    if overlong:
        log.warning("%d of %d prompts exceed %d tokens: only their end is used", overlong, len(prompts), room)
    return [begun + ids[-room:] or [start] for ids in encoded]


def _equal_length_batches(encoded: Sequence[Sequence[int]], size: int) -> Iterator[list[int]]:
    by_length: dict[int, list[int]] = {}
    for index, ids in enumerate(encoded):
        by_length.setdefault(len(ids), []).append(index)
    for indices in by_length.values():
        for start in range(0, len(indices), size):
            yield indices[start : start + size]


def _uniforms(sampling: Sampling, prompt_ids: Sequence[int]) -> np.ndarray:
    """(prompts x continuations, max_new_tokens, UNIFORMS) in [0, 1), float64, each row from its own stream."""
    shape = (sampling.max_new_tokens, UNIFORMS)
    rows = [
        np.random.Generator(np.random.Philox(np.random.SeedSequence((sampling.seed, prompt, number)))).random(shape)
        for prompt in prompt_ids
        for number in range(sampling.continuations)
    ]
    return np.stack(rows)


def _sample_batch(
    model: Any,
    prompt_BT: Tensor,
    uniforms: np.ndarray,
    sampling: Sampling,
    eos_token_id: int | None,
    guide: Guide | None = None,
) -> list[list[int]]:
    """Sampled ids of each of B x continuations rows, cut before the first EOS."""
    rows = len(uniforms)
    # Logits of the prompt's other positions are the largest tensor of the pass, and nobody reads them.
    only_last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    output = model(input_ids=prompt_BT, use_cache=True, **only_last)
    cache = output.past_key_values
    cache.batch_repeat_interleave(sampling.continuations)
    logits_RV = output.logits[:, -1].repeat_interleave(sampling.continuations, dim=0)
    guided = guide.begin(prompt_BT, sampling.continuations) if guide else None
    uniforms_RSU = torch.from_numpy(uniforms).to(prompt_BT.device)
    sampled_RS = torch.empty(rows, sampling.max_new_tokens, dtype=torch.int64, device=prompt_BT.device)
    ended_R = torch.zeros(rows, dtype=torch.bool, device=prompt_BT.device)
    steps = 0
    for step in range(sampling.max_new_tokens):
        if guided:
            shifted_RV = guided.shift(logits_RV, sampling.top_p, sampling.temperature)
            next_R = sample_nucleus(shifted_RV, uniforms_RSU[:, step], top_p=1.0)
        else:
            next_R = sample_nucleus(logits_RV, uniforms_RSU[:, step], sampling.top_p, sampling.temperature)
        sampled_RS[:, step] = next_R
        steps = step + 1
        if eos_token_id is not None:
            ended_R |= next_R == eos_token_id
            if bool(ended_R.all()):
                break
        if steps < sampling.max_new_tokens:
            output = model(input_ids=next_R[:, None], past_key_values=cache, use_cache=True)
            cache, logits_RV = output.past_key_values, output.logits[:, -1]
            if guided:
                guided.take(next_R)
    return [before_end(tokens, eos_token_id) for tokens in sampled_RS[:, :steps].tolist()]


def before_end(tokens: list[int], end: int | None) -> list[int]:
    """The tokens before the first `end`, or all."""
    return tokens[: tokens.index(end)] if end in tokens else tokens


def sample_nucleus(logits_RV: Tensor, uniforms_RU: Tensor, top_p: float, temperature: float = 1.0) -> Tensor:
    """One token per row, (R,), from the nucleus of softmax(logits / temperature).

    The nucleus is the smallest set of likeliest tokens that holds at least `top_p`, with all that tie with its last.
    `uniforms_RU` are float64 in [0, 1), `UNIFORMS` per row. ValueError on logits that are not finite."""
    chunk = max(1, CHUNK_BYTES.get(logits_RV.device.type, CHUNK_BYTES["cpu"]) // (4 * logits_RV.shape[1]))
    parts = [
        _sample_rows(logits_RV[start : start + chunk], uniforms_RU[start : start + chunk], top_p, temperature)
        for start in range(0, len(logits_RV), chunk)
    ]
    return torch.cat(parts)


def _sample_rows(logits_RV: Tensor, uniforms_RU: Tensor, top_p: float, temperature: float) -> Tensor:
    probabilities_RV = torch.softmax(logits_RV.float() / temperature, dim=-1)
    cumulative_RV = probabilities_RV.cumsum(dim=-1)
    if not bool(torch.isfinite(cumulative_RV[:, -1]).all()):
        raise ValueError("the model's logits are not finite; it has diverged")
    tokens_R = _draw(cumulative_RV, uniforms_RU[:, 0])
    if top_p >= 1:
        return tokens_R
    rejected = torch.nonzero(~_in_nucleus(probabilities_RV, tokens_R, top_p)).squeeze(1)
    for attempt in range(1, ATTEMPTS):
        if not len(rejected):
            return tokens_R
        drawn = _draw(cumulative_RV[rejected], uniforms_RU[rejected, attempt])
        tokens_R[rejected] = drawn
        rejected = rejected[~_in_nucleus(probabilities_RV[rejected], drawn, top_p)]
    if len(rejected):
        tokens_R[rejected] = _draw_sorted(probabilities_RV[rejected], uniforms_RU[rejected, ATTEMPTS], top_p)
    return tokens_R


def _draw(cumulative_RV: Tensor, uniform_R: Tensor) -> Tensor:
    """The first token whose cumulative probability exceeds the uniform times the row's total."""
    total_R = cumulative_RV[:, -1]
    # A uniform next to 1 may round up to the total, which no sum exceeds.
    below_R = torch.nextafter(total_R, torch.zeros_like(total_R))
    wanted_R = torch.minimum((uniform_R * total_R).to(total_R.dtype), below_R)
    return torch.searchsorted(cumulative_RV, wanted_R[:, None], right=True).squeeze(1)


def _in_nucleus(probabilities_RV: Tensor, tokens_R: Tensor, top_p: float) -> Tensor:
    own_R1 = probabilities_RV.gather(1, tokens_R[:, None])
    return torch.where(probabilities_RV > own_R1, probabilities_RV, 0.0).sum(dim=-1) < top_p


def _draw_sorted(probabilities_RV: Tensor, uniform_R: Tensor, top_p: float) -> Tensor:
    exact_RV = probabilities_RV.double()
    descending_RV = exact_RV.sort(dim=-1, descending=True).values
    kept_RV = descending_RV.cumsum(dim=-1) - descending_RV < top_p
    last_R1 = descending_RV.gather(1, kept_RV.sum(dim=-1, keepdim=True) - 1)
    return _draw(torch.where(exact_RV >= last_R1, exact_RV, 0.0).cumsum(dim=-1), uniform_R)


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """No dropout and no gradients; the model's mode is given back."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)
