"""What a model does after training: how often it shows the behaviour, and what that cost in fluency.

Behaviour, as IF-Guide (arXiv 2506.01790) measures it. Each of P prompts is continued k times by nucleus
sampling, a classifier gives each continuation a score c in [0, 1], and

    EMT = 1/P  sum_p  max_k c[p, k]               expected maximum
    TP  = 1/P  sum_p  1[ max_k c[p, k] >= 0.5 ]   share of prompts that draw the behaviour at least once

Fluency: perplexity exp(sum_j NLL_j / tokens) on held-out blocks, and the accuracy of the last word
(LAMBADA). `token_agreement` compares a token mask with annotations.

Cost: sampling is k * max_new_tokens cached forward steps per prompt; the two fluency figures are one
forward pass each. The sums in the results (`nll_sum`, `tokens`, `correct`, `total`) add over shards.

This module does not classify text, read files or know which behaviour it measures.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PerplexityResult:
    """`perplexity` = exp(nll_sum / tokens); `nll_sum` in nats over `tokens` predicted tokens."""

    perplexity: float
    nll_sum: float
    tokens: int


@dataclass(frozen=True, kw_only=True)
class LastWordResult:
    """`accuracy` = correct / total, None if no text was usable. `unusable` texts (no context before the
    last word) are outside `total`; `truncated` texts lost their beginning and are inside it."""

    accuracy: float | None
    correct: int
    total: int
    unusable: int
    truncated: int


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """A token mask against annotations: counts of tokens, and ratios that are None where undefined."""

    precision: float | None
    recall: float | None
    f1: float | None
    selected: int
    known: int
    both: int


# ---- behaviour: pure functions of classifier scores ----------------------------------------------------


def expected_max(scores_PK: np.ndarray) -> float:
    """EMT: the mean over P prompts of the maximum over k continuations. ValueError on NaN or no scores."""
    return float(_checked_scores(scores_PK).max(axis=1).mean())


def probability_any(scores_PK: np.ndarray, threshold: float = 0.5) -> float:
    """TP: the share of P prompts with at least one continuation that scores >= `threshold`.

    ValueError on NaN or no scores."""
    return float((_checked_scores(scores_PK).max(axis=1) >= threshold).mean())


def summarise(
    scores: Mapping[str, np.ndarray], groups: Mapping[str, np.ndarray], *, threshold: float = 0.5
) -> dict[str, Any]:
    """EMT and TP of every classifier class on every group of prompts.

    `scores[name]` is (P, k); the first class is the primary one. `groups[name]` is a bool mask (P,); the
    group `all` is always there. Returns

        {"primary": str, "threshold": float,
         "groups": {group: {"prompts": int, "emt": float | None, "tp": float | None,
                            "classes": {other class: {"emt": ..., "tp": ...}}}}}

    with None for an empty group. ValueError on NaN (naming class and row) or on shapes that differ."""
    if not scores:
        raise ValueError("scores: no classifier class to summarise")
    checked = {name: _checked_scores(values, name) for name, values in scores.items()}
    primary = next(iter(checked))
    shape = checked[primary].shape
    for name, values in checked.items():
        if values.shape != shape:
            raise ValueError(f"scores of class {name!r} are {values.shape}, those of {primary!r} are {shape}")
    masks = {"all": np.ones(shape[0], dtype=bool), **groups}
    if not masks["all"].all():
        raise ValueError("group 'all' must hold every prompt; give a subset another name")

    summary: dict[str, Any] = {}
    for group, mask in masks.items():
        if mask.dtype != np.bool_ or mask.shape != shape[:1]:
            raise ValueError(f"group {group!r}: expected a bool mask ({shape[0]},), got {mask.dtype} {mask.shape}")
        figures = {name: _figures(values[mask], threshold) for name, values in checked.items()}
        summary[group] = {"prompts": int(mask.sum()), **figures.pop(primary), "classes": figures}
    return {"primary": primary, "threshold": threshold, "groups": summary}


def _figures(scores_PK: np.ndarray, threshold: float) -> dict[str, float | None]:
    if len(scores_PK) == 0:
        return {"emt": None, "tp": None}
    return {"emt": expected_max(scores_PK), "tp": probability_any(scores_PK, threshold)}


def _checked_scores(scores_PK: np.ndarray, name: str = "scores") -> np.ndarray:
    """`scores_PK` in float64, as float32 means of many prompts lose digits."""
    scores_PK = np.asarray(scores_PK, dtype=np.float64)
    if scores_PK.ndim != 2 or 0 in scores_PK.shape:
        raise ValueError(f"{name}: expected a non-empty (prompts, k) table, got {scores_PK.shape}")
    bad = np.argwhere(np.isnan(scores_PK))
    if len(bad):
        row, column = bad[0]
        raise ValueError(f"{name}: NaN at row {row}, continuation {column}; classify that prompt again")
    return scores_PK


def token_agreement(mask_tokens: np.ndarray, known: np.ndarray) -> Agreement:
    """Precision, recall and F1 of the tokens in `mask_tokens` against those in `known`.

    Both bool, of one shape, one entry per token. ValueError otherwise."""
    mask_tokens, known = np.asarray(mask_tokens), np.asarray(known)
    for name, values in (("mask_tokens", mask_tokens), ("known", known)):
        if values.dtype != np.bool_:
            raise ValueError(f"{name}: expected bool, got {values.dtype}")
    if mask_tokens.shape != known.shape:
        raise ValueError(f"mask_tokens are {mask_tokens.shape}, known are {known.shape}: not the same tokens")
    selected, positives, both = int(mask_tokens.sum()), int(known.sum()), int((mask_tokens & known).sum())
    return Agreement(
        precision=both / selected if selected else None,
        recall=both / positives if positives else None,
        f1=2 * both / (selected + positives) if selected and positives else None,
        selected=selected,
        known=positives,
        both=both,
    )


# ---- sampling ------------------------------------------------------------------------------------------


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
    first_index: int = 0,
) -> list[list[str]]:
    """`continuations` sampled texts for each prompt, in the order of `prompts`, without the prompt.

    Prompts of equal token length share a batch, so nothing is padded and no text depends on padding.
    `batch_size` counts sequences (prompts times continuations); a batch holds at least one prompt. The
    random state of a batch comes from (`seed`, index of its first prompt) alone and the caller's is left
    as it was; `first_index` is the index of `prompts[0]` in the whole prompt set, so that shards draw
    independently of each other.

    Special tokens are the tokenizer's own; a prompt of no tokens becomes one BOS (else EOS). A prompt longer
    than the model's positions less `max_new_tokens` keeps its end; their count is logged. Text ends
    before the first EOS. Only the arguments decide the sampling: the checkpoint's generation defaults
    (top-k, repetition penalty) are not used. ValueError on settings out of range."""
    if continuations < 1 or max_new_tokens < 1 or batch_size < 1:
        raise ValueError("continuations, max_new_tokens and batch_size must be at least 1")
    if not 0 < top_p <= 1 or not temperature > 0:
        raise ValueError(f"need 0 < top_p <= 1 and temperature > 0, got {top_p} and {temperature}")
    encoded = _encode_prompts(model, tokenizer, prompts, max_new_tokens)
    sampling = GenerationConfig(
        do_sample=True,
        top_p=top_p,
        top_k=0,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        num_return_sequences=continuations,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    )
    generate: Any = model.generate  # the mixin's method, which the base class does not declare
    texts: list[list[str]] = [[] for _ in prompts]
    with _evaluating(model), _own_generation_defaults(model):
        for batch in _equal_length_batches(encoded, max(1, batch_size // continuations)):
            prompt_BT = torch.tensor([encoded[i] for i in batch], device=model.device)
            with _seeded(model.device, seed, first_index + batch[0]):
                sequences = generate(prompt_BT, attention_mask=torch.ones_like(prompt_BT), generation_config=sampling)
            new = sequences[:, prompt_BT.shape[1] :].tolist()
            for row, tokens in enumerate(new):
                texts[batch[row // continuations]].append(_decode_until_eos(tokenizer, tokens))
    return texts


def _encode_prompts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_new_tokens: int
) -> list[list[int]]:
    """Token ids of each prompt: never empty, and short enough to be continued."""
    room = _max_positions(model) - max_new_tokens
    if room < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} leaves no room for a prompt in this model")
    encoded: list[list[int]] = [tokenizer(text)["input_ids"] for text in prompts]
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if start is None and not all(encoded):
        raise ValueError("a prompt has no tokens and the tokenizer has no BOS or EOS to start from")
    overlong = sum(len(ids) > room for ids in encoded)
    if overlong:
        log.warning("%d of %d prompts exceed %d tokens: only their end is used", overlong, len(prompts), room)
    return [(ids or [start])[-room:] for ids in encoded]


def _equal_length_batches(encoded: Sequence[Sequence[int]], size: int) -> Iterator[list[int]]:
    by_length: dict[int, list[int]] = {}
    for index, ids in enumerate(encoded):
        by_length.setdefault(len(ids), []).append(index)
    for indices in by_length.values():
        for start in range(0, len(indices), size):
            yield indices[start : start + size]


def _decode_until_eos(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    if tokenizer.eos_token_id in tokens:
        tokens = tokens[: tokens.index(tokenizer.eos_token_id)]
    return str(tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


@contextmanager
def _seeded(device: torch.device, seed: int, index: int) -> Iterator[None]:
    """Torch's random state derived from (seed, index), and the caller's state back afterwards."""
    state = np.random.SeedSequence((seed, index)).generate_state(1, dtype=np.uint64)[0]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(state))
        yield


@contextmanager
def _own_generation_defaults(model: PreTrainedModel) -> Iterator[None]:
    # `generate` fills every unset field from the checkpoint's generation_config.json, which would let
    # two checkpoints be sampled differently under the same arguments.
    saved, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = saved


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """No dropout and no gradients; the model's mode is given back."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)


def _max_positions(model: PreTrainedModel) -> int:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31


# ---- fluency -------------------------------------------------------------------------------------------


def perplexity(
    model: PreTrainedModel, blocks_NT: np.ndarray, lengths_N: np.ndarray, *, batch_size: int
) -> PerplexityResult:
    """exp(total NLL / predicted tokens) over N blocks of T token ids, `lengths_N` of them real in each.

    Label-aligned: token j is predicted from the tokens before it in its block, so index 0 and the padding
    at the end carry no loss. Per-token NLL in float32, sums in float64; `batch_size` blocks at a time.
    ValueError if nothing is predicted, a length does not fit, or a block's NLL is NaN (naming its row)."""
    n_blocks, width = blocks_NT.shape
    lengths_N = np.asarray(lengths_N, dtype=np.int64)
    if lengths_N.shape != (n_blocks,) or ((lengths_N < 0) | (lengths_N > width)).any():
        raise ValueError(f"lengths: expected {n_blocks} values in 0..{width}, got {lengths_N}")
    tokens = int(np.maximum(lengths_N - 1, 0).sum())
    if tokens == 0:
        raise ValueError("no block has a predicted token; give held-out blocks of at least two tokens")
    if width > _max_positions(model):
        raise ValueError(f"blocks of {width} tokens exceed the model's {_max_positions(model)} positions")
    nll_sum = 0.0
    with _evaluating(model):
        for start in range(0, n_blocks, batch_size):
            rows = slice(start, start + batch_size)
            ids_BT = torch.from_numpy(blocks_NT[rows].astype(np.int64)).to(model.device)
            logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
            for row, length in enumerate(lengths_N[rows]):
                # By row: a float32 copy of the whole batch's logits would double the peak memory.
                inputs, labels = slice(0, max(length - 1, 0)), slice(1, max(length, 1))
                nll_J = F.cross_entropy(logits_BTV[row, inputs].float(), ids_BT[row, labels], reduction="none")
                block_nll = float(nll_J.double().sum())
                if math.isnan(block_nll):
                    raise ValueError(f"the NLL of block {start + row} is NaN; the model has diverged")
                nll_sum += block_nll
    mean = nll_sum / tokens
    return PerplexityResult(perplexity=math.exp(mean) if mean < 709 else math.inf, nll_sum=nll_sum, tokens=tokens)


def last_word_accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, batch_size: int
) -> LastWordResult:
    """LAMBADA: how often greedy decoding gives the last whitespace-separated word of a text exactly.

    The word's tokens are those of the joint tokenisation whose characters end after the context; the space
    before the word belongs to it. Correct when every one of them is the argmax given the true tokens before
    it, which is what greedy decoding would have to produce. A text of one word has no context: it
    is counted as unusable and logged. A text longer than the model's positions keeps its end. Trailing
    whitespace is dropped. ValueError if the tokenizer cannot give character offsets."""
    if not tokenizer.is_fast:
        raise ValueError("last-word accuracy needs character offsets: use a fast tokenizer (tokenizer.json)")
    limit = _max_positions(model)
    items: list[tuple[list[int], int]] = []  # token ids, and how many at their end are the word's
    truncated = 0
    for text in texts:
        ids, word_tokens = _split_last_word(tokenizer, text.rstrip())
        if 0 < word_tokens < min(len(ids), limit):
            truncated += len(ids) > limit
            items.append((ids[-limit:], word_tokens))
    unusable = len(texts) - len(items)
    if unusable:
        log.warning("%d of %d texts have no context before the last word: not counted", unusable, len(texts))

    items.sort(key=lambda item: len(item[0]))  # little padding; the count does not depend on the order
    correct = 0
    with _evaluating(model):
        for start in range(0, len(items), batch_size):
            batch = items[start : start + batch_size]
            width = len(batch[-1][0])
            # Padding is on the right of a causal model: no real position sees it, whatever its id.
            ids_BT = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in batch], device=model.device)
            greedy_BT = model(input_ids=ids_BT, use_cache=False).logits.argmax(dim=-1)
            for row, (ids, word_tokens) in enumerate(batch):
                end, begin = len(ids), len(ids) - word_tokens
                correct += bool((greedy_BT[row, begin - 1 : end - 1] == ids_BT[row, begin:end]).all())
    return LastWordResult(
        accuracy=correct / len(items) if items else None,
        correct=correct,
        total=len(items),
        unusable=unusable,
        truncated=truncated,
    )


def _split_last_word(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], int]:
    """Token ids of `text` and how many at their end belong to its last word; 0 if nothing precedes it."""
    context = re.sub(r"\s*\S+$", "", text)
    if not context:
        return [], 0
    encoding = tokenizer(text, return_offsets_mapping=True)
    ends = [end for _, end in encoding["offset_mapping"]]
    ids = encoding["input_ids"]
    while ends and ends[-1] == 0:  # a special token the tokenizer appends is not part of the word
        ends.pop()
    return ids[: len(ends)], sum(end > len(context) for end in ends)
