"""From texts to blocks and their scores in one process, without a cluster or a run directory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ifguide.corpus.packing import pack, tokenise
from ifguide.corpus.reading import RawDocument
from ifguide.influence.method import PRESETS, Attribution, Method
from ifguide.influence.scorer import TokenScorer
from ifguide.selection.algorithm import Documents


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedTexts:
    """Texts laid end to end, each closed by an EOS, and cut into blocks of T tokens.

    blocks_NT: int32 token ids, the last block padded with the EOS; lengths_N: int64, real tokens of each block;
    documents: which tokens of the stream are of which text. Text d is document d.
    """

    blocks_NT: NDArray[np.int32]
    lengths_N: NDArray[np.int64]
    documents: Documents


def pack_texts(
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    *,
    block_size: int,
    special_tokens: Literal["text", "token"] = "text",
) -> PackedTexts:
    """The texts as a corpus has them. `special_tokens`: what the name of a special token within a text is, as in
    `pack_corpus.special_tokens`. Raises ValueError when there are no texts, TypeError for a single string."""
    if isinstance(texts, str):
        raise TypeError("texts: one string, not a sequence of them; write [text]")
    if not texts:
        raise ValueError("no texts to pack")
    raw = [RawDocument(row=row, text=text) for row, text in enumerate(texts)]
    before = tokenizer.split_special_tokens
    tokenizer.split_special_tokens = special_tokens == "text"
    try:
        tokens = [encoded.tokens for encoded in tokenise(raw, tokenizer, annotate=False)]
    finally:
        tokenizer.split_special_tokens = before
    sizes = np.array([len(ids) for ids in tokens], np.int64)
    blocks_NT, lengths_N = pack(
        tokens, skip=0, num_tokens=int(sizes.sum()), block_size=block_size, fill=int(tokenizer.eos_token_id)
    )
    documents = Documents(token_start=np.cumsum(sizes) - sizes, num_tokens=sizes)
    return PackedTexts(blocks_NT=blocks_NT, lengths_N=lengths_N.astype(np.int64), documents=documents)


def score_tokens(
    model: PreTrainedModel,
    direction: Mapping[str, Tensor],
    blocks_NT: NDArray[np.int32],
    lengths_N: NDArray[np.int64],
    *,
    attribution: Attribution = "target",
    method: Method = PRESETS["exact"],
    batch_blocks: int = 8,
    beginning: int | None = None,
) -> NDArray[np.float32]:
    """The influence score of every token, (N, T) float32: <V, grad NLL_j>, Eq. 8 of IF-Guide (arXiv 2506.01790).

    direction: V per tracked module, as `build_direction` gives it. Scores are label aligned: entry j of a block speaks
    of predicting token j; index 0 and padding are 0. A positive score: training on the token makes the positive
    completions of V likelier. `attribution="position"` is what the paper's code computes instead. `batch_blocks` are
    scored at a time. `beginning`: the BOS that the model was trained with before each text, if it was; it has no score.

    Raises:
        ValueError: V is not of this model, the model is in training mode, or its LM head is not understood.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    scorer = TokenScorer(model, direction, attribution=attribution, method=method, beginning=beginning)
    tokens_NT, lengths = torch.from_numpy(blocks_NT.astype(np.int64)), torch.from_numpy(lengths_N.astype(np.int64))
    batches = zip(tokens_NT.split(batch_blocks), lengths.split(batch_blocks), strict=True)
    scores = [scorer.score(tokens, sizes).float().cpu().numpy() for tokens, sizes in batches]
    for parameter in trainable:  # a scorer turns it off
        parameter.requires_grad_(True)
    return np.concatenate(scores)
