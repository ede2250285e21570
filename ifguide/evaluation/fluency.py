"""What detoxification costs: perplexity of held-out text, and the last words of texts (LAMBADA).

Perplexity is exp(sum_j NLL_j / tokens) over held-out blocks. Of a text's last word, greedy decoding is right when it
gives every token of it; its last token alone, given all before it, is the looser figure of the two.

Cost: one forward pass each. The results keep what each block and text gave, for intervals and paired tests; their
sums (`nll_sum`, `tokens`, `correct`, `total`) add over shards. It does not read files.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ifguide.evaluation.generation import evaluating
from ifguide.models import max_positions
from ifguide.tokenizer import beginning_token

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PerplexityResult:
    """`perplexity` = exp(nll_sum / tokens); `nll_sum` in nats over `tokens` predicted tokens; both by block too."""

    perplexity: float
    block_nll: tuple[float, ...]
    block_tokens: tuple[int, ...]
    nll_sum: float
    tokens: int


@dataclass(frozen=True, kw_only=True)
class LastWordResult:
    """`accuracy` = correct / total, None if no text was usable; `token_accuracy` that of the last token alone.

    `unusable` texts (no context before the last word) are outside `total`; `truncated` texts lost their beginning and
    are inside it. `word_correct` and `token_correct` are in the order of the texts, None where unusable."""

    accuracy: float | None
    token_accuracy: float | None
    correct: int
    total: int
    unusable: int
    truncated: int
    word_correct: tuple[bool | None, ...]
    token_correct: tuple[bool | None, ...]


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
    if width > max_positions(model):
        raise ValueError(f"blocks of {width} tokens exceed the model's {max_positions(model)} positions")
    nll_N: list[float] = []
    with evaluating(model):
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
                nll_N.append(block_nll)
    nll_sum = sum(nll_N)
    mean = nll_sum / tokens
    return PerplexityResult(
        perplexity=math.exp(mean) if mean < 709 else math.inf,
        nll_sum=nll_sum,
        tokens=tokens,
        block_nll=tuple(nll_N),
        block_tokens=tuple(np.maximum(lengths_N - 1, 0).tolist()),
    )


def last_word_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    batch_size: int,
    special_tokens: bool = False,
) -> LastWordResult:
    """LAMBADA: how often greedy decoding gives the last whitespace-separated word of a text exactly.

    The word's tokens are those of the joint tokenisation whose characters end after the context; the space
    before the word belongs to it. Correct when every one of them is the argmax given the true tokens before
    it, which is what greedy decoding would have to produce. A text of one word has no context: it
    is counted as unusable and logged. A text longer than the model's positions keeps its end, behind its BOS. Trailing
    whitespace is dropped. `special_tokens`: as in `generation.sample_tokens`. ValueError if the tokenizer cannot give
    character offsets."""
    if not tokenizer.is_fast:
        raise ValueError("last-word accuracy needs character offsets: use a fast tokenizer (tokenizer.json)")
    limit = max_positions(model)
    bos = beginning_token(tokenizer) if special_tokens else None
    begun = 0 if bos is None or limit == 1 else 1
    items: list[tuple[list[int], int, int]] = []  # token ids, how many at their end are the word's, place of the text
    truncated = 0
    for place, text in enumerate(texts):
        ids, word_tokens = _split_last_word(tokenizer, text.rstrip(), special_tokens)
        if 0 < word_tokens < min(len(ids), limit):
            truncated += len(ids) > limit
            kept = ids if len(ids) <= limit else [*ids[:begun], *ids[begun - limit :]]
            items.append((kept, word_tokens, place))
    unusable = len(texts) - len(items)
    if unusable:
        log.warning("%d of %d texts have no context before the last word: not counted", unusable, len(texts))

    items.sort(key=lambda item: len(item[0]))  # little padding; the count does not depend on the order
    words: list[bool | None] = [None] * len(texts)
    tokens: list[bool | None] = [None] * len(texts)
    with evaluating(model):
        for start in range(0, len(items), batch_size):
            batch = items[start : start + batch_size]
            width = len(batch[-1][0])
            # Padding is on the right of a causal model: no real position sees it, whatever its id.
            ids_BT = torch.tensor([ids + [0] * (width - len(ids)) for ids, _, _ in batch], device=model.device)
            greedy_BT = model(input_ids=ids_BT, use_cache=False).logits.argmax(dim=-1)
            for row, (ids, word_tokens, place) in enumerate(batch):
                end, begin = len(ids), len(ids) - word_tokens
                right = greedy_BT[row, begin - 1 : end - 1] == ids_BT[row, begin:end]
                words[place], tokens[place] = bool(right.all()), bool(right[-1])
    correct, tokens_correct = sum(map(bool, words)), sum(map(bool, tokens))
    return LastWordResult(
        accuracy=correct / len(items) if items else None,
        token_accuracy=tokens_correct / len(items) if items else None,
        correct=correct,
        total=len(items),
        unusable=unusable,
        truncated=truncated,
        word_correct=tuple(words),
        token_correct=tuple(tokens),
    )


def _split_last_word(tokenizer: PreTrainedTokenizerBase, text: str, special_tokens: bool) -> tuple[list[int], int]:
    """Token ids of `text` and how many at their end belong to its last word; 0 if nothing precedes it."""
    parts = text.rsplit(maxsplit=1)
    if len(parts) < 2:
        return [], 0
    context = parts[0]
    encoding = tokenizer(text, add_special_tokens=special_tokens, return_offsets_mapping=True)
    ends = [end for _, end in encoding["offset_mapping"]]
    ids = encoding["input_ids"]
    while ends and ends[-1] == 0:  # a special token the tokenizer appends is not part of the word
        ends.pop()
    return ids[: len(ends)], sum(end > len(context) for end in ends)
