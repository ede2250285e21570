"""Documents to tokens, and tokens laid end to end and cut into blocks (pure).

Order: with `interleave`, document i of an input of n documents lies at (i + 1/2) / n, ties by input; so each
run of the stream needs one contiguous range per input, and any shard can be packed without the others.

Memory is one chunk.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from ifguide.config import Input, redact
from ifguide.corpus.reading import Chunk, RawDocument, read_documents
from ifguide.spans.mapping import token_stops

TOKENISE_BATCH = 256  # documents per tokeniser call: enough for its batching, little memory


class Encoded(NamedTuple):
    """A tokenised document, its EOS included: ids int32, the characters at which they stop (`spans.token_stops`), and
    whether each overlaps one of the document's spans, if that was asked."""

    tokens: np.ndarray
    stops: np.ndarray
    annotated: np.ndarray | None


def tokenise(documents: Sequence[RawDocument], tokenizer: Any, *, annotate: bool) -> list[Encoded]:
    """Good documents as tokens with EOS appended; `annotate` asks for `Encoded.annotated`."""
    if not documents:
        return []  # a tokenizer refuses a list of no texts
    encoded = tokenizer(
        [document.text for document in documents],
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=True,
        verbose=False,
    )
    results = []
    for i, document in enumerate(documents):
        tokens = np.array([*encoded["input_ids"][i], tokenizer.eos_token_id], dtype=np.int32)
        stops = token_stops(encoded["offset_mapping"][i], len(document.text))
        flags = None
        if annotate:
            flags = np.zeros(len(tokens), dtype=bool)
            offsets = np.array(encoded["offset_mapping"][i], dtype=np.int64).reshape(-1, 2)
            for start, stop in document.spans:
                flags[:-1] |= (offsets[:, 0] < stop) & (offsets[:, 1] > start)
        results.append(Encoded(tokens, stops, flags))
    return results


def token_table(
    chunk: Chunk, source: Input, tokenizer: Any, *, first_input_row: int, annotate: bool
) -> tuple[pa.Table, list[dict[str, Any]], int]:
    """Tokenise a chunk: a table `row, num_chars, tokens, stops, special_texts[, annotated]`
    (how often the text names a special token), the bad rows with their reasons, and how
    many rows were read. Rows count from the chunk's first; `first_input_row` is that one's, for `source.rows`.
    """
    start, stop = source.rows or (0, np.iinfo(np.int64).max)
    good: list[RawDocument] = []
    bad: list[dict[str, Any]] = []
    read = 0
    for document in read_documents(chunk, source, first_row=0):
        read += 1
        if not start <= first_input_row + document.row < stop:
            continue
        reason = document.reason or _unknown_token(document, tokenizer)
        if reason is None:
            good.append(document)
        else:
            bad.append({"source": redact(chunk.name), "row": document.row, "reason": reason})
    names = re.compile("|".join(map(re.escape, tokenizer.all_special_tokens)))
    encoded = [_as_given(document.tokens, annotate=annotate) for document in good if document.tokens is not None]
    texts = [
        document for document in good if document.tokens is None
    ]  # none, where there are ids: an input has one kind
    for i in range(0, len(texts), TOKENISE_BATCH):
        encoded += tokenise(texts[i : i + TOKENISE_BATCH], tokenizer, annotate=annotate)
    columns: dict[str, Any] = {
        "row": pa.array([document.row for document in good], type=pa.int64()),
        "num_chars": pa.array([document.num_chars for document in good], type=pa.int64()),
        "num_tokens": pa.array([len(document.tokens) for document in encoded], type=pa.int64()),
        "tokens": pa.array([document.tokens for document in encoded], type=pa.large_list(pa.int32())),
        "stops": pa.array([document.stops for document in encoded], type=pa.large_list(pa.int32())),
        "special_texts": pa.array([len(names.findall(document.text)) for document in good], type=pa.int64()),
    }
    if annotate:
        columns["annotated"] = pa.array([document.annotated for document in encoded], type=pa.large_list(pa.bool_()))
    return pa.table(columns), bad, read


def _as_given(tokens: np.ndarray, *, annotate: bool) -> Encoded:
    """A document of token ids alone: a token counts as a character of its text, and the last one as what closes it."""
    stops = np.arange(1, len(tokens) + 1, dtype=np.int32)
    return Encoded(tokens, stops, np.zeros(len(tokens), bool) if annotate else None)


def _unknown_token(document: RawDocument, tokenizer: Any) -> str | None:
    if document.tokens is None or (largest := int(document.tokens.max())) < len(tokenizer):
        return None
    return f"token id {largest} is none of the tokenizer's {len(tokenizer)}"


def stream_order(counts: Sequence[int], *, interleave: bool) -> tuple[np.ndarray, np.ndarray]:
    """Order of all documents in the stream, from the number of documents per input.

    Returns (input index int32, document index in its input int64), both of length sum(counts).
    """
    inputs = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    indices = np.concatenate([np.arange(n, dtype=np.int64) for n in counts]) if len(counts) else np.zeros(0, np.int64)
    if interleave:
        order = merge_order([(0, n) for n in counts], counts)
        return inputs[order], indices[order]
    return inputs, indices


def merge_order(ranges: Sequence[tuple[int, int]], counts: Sequence[int]) -> np.ndarray:
    """Stream order of the documents `ranges[i]` of every input i (of counts[i] documents), as indices into
    the concatenation of the ranges. A shard calls this on its own ranges and gets the global order's part."""
    places = [(np.arange(lo, hi) + 0.5) / max(n, 1) for (lo, hi), n in zip(ranges, counts, strict=True)]
    return np.argsort(np.concatenate(places), kind="stable") if places else np.zeros(0, np.int64)


def pack(
    tokens: Sequence[np.ndarray], *, skip: int, num_tokens: int, block_size: int, fill: int
) -> tuple[np.ndarray, np.ndarray]:
    """Lay arrays end to end, leave out the first `skip` entries, keep `num_tokens`, cut into blocks.

    Returns (blocks_BT of the input's dtype, the last one filled up with `fill`; lengths_B int32).
    """
    stream = np.concatenate(tokens)[skip : skip + num_tokens]
    assert len(stream) == num_tokens, (len(stream), num_tokens)
    num_blocks = -(-num_tokens // block_size)
    blocks_BT = np.full((num_blocks, block_size), fill, dtype=stream.dtype)
    blocks_BT.reshape(-1)[:num_tokens] = stream
    lengths_B = np.full(num_blocks, block_size, dtype=np.int32)
    lengths_B[-1] = num_tokens - (num_blocks - 1) * block_size
    return blocks_BT, lengths_B
