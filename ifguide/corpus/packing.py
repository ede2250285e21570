"""Documents to tokens, and tokens laid end to end and cut into blocks (pure).

Order: with `interleave`, document i of an input of n documents lies at (i + 1/2) / n, ties by input; so each
run of the stream needs one contiguous range per input, and any shard can be packed without the others.

Memory is a group of a chunk's documents (GROUP_CHARS), of which a single document may be most (`pieces`).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from ifguide.config import Input, redact
from ifguide.corpus.pieces import PIECE_CHARS, Tokens, encode, encode_long
from ifguide.corpus.reading import Chunk, RawDocument, read_documents
from ifguide.records.choice import RowChoice
from ifguide.spans.mapping import token_stops

TOKENISE_BATCH = 256  # documents per tokeniser call: enough for its batching, little memory
GROUP_CHARS = 1 << 25  # of the documents that are in memory at once, with their tokens: some 5 bytes a character


class Encoded(NamedTuple):
    """A tokenised document, its EOS included: ids int32, the characters at which they stop (`spans.token_stops`), and
    whether each overlaps one of the document's spans, if that was asked; one of no characters overlaps none."""

    tokens: np.ndarray
    stops: np.ndarray
    annotated: np.ndarray | None


def tokenise(documents: Sequence[RawDocument], tokenizer: Any, *, annotate: bool) -> list[Encoded]:
    """Good documents as tokens with EOS appended; `annotate` asks for `Encoded.annotated`."""
    return [
        _encoded(document, parts, tokenizer.eos_token_id, annotate=annotate)
        for group in _groups(documents)
        for document, parts in zip(group, _parts(group, tokenizer), strict=True)
    ]


def _groups(documents: Sequence[RawDocument]) -> Iterator[list[RawDocument]]:
    """Documents that are tokenised in one call: some, and few characters; a long one alone."""
    group: list[RawDocument] = []
    characters = 0
    for document in documents:
        if group and (len(group) == TOKENISE_BATCH or characters + len(document.text) > PIECE_CHARS):
            yield group
            group, characters = [], 0
        group.append(document)
        characters += len(document.text)
    if group:
        yield group


def _parts(group: Sequence[RawDocument], tokenizer: Any) -> Iterator[Iterable[Tokens]]:
    if len(group) == 1 and len(group[0].text) > PIECE_CHARS:
        yield encode_long(group[0].text, tokenizer)
    else:
        yield from ([tokens] for tokens in encode([document.text for document in group], tokenizer))


def _encoded(document: RawDocument, parts: Iterable[Tokens], eos: int, *, annotate: bool) -> Encoded:
    # These grow in place. Arrays of parts, joined at the end, would take twice the memory of a long document's tokens.
    ids, stops, flags = bytearray(), bytearray(), bytearray()
    spans = [(start, stop) for start, stop in document.spans if start < stop]  # others hold no character
    last = np.int32(0)
    for part in parts:
        ids += np.ascontiguousarray(part.ids).data
        reached = np.maximum(token_stops(part.offsets[:, 1], 0)[:-1], last)
        stops += reached.data
        last = reached[-1] if len(reached) else last
        if annotate:
            inside = np.zeros(len(part.ids), bool)
            for start, stop in spans:
                inside |= (part.offsets[:, 0] < stop) & (part.offsets[:, 1] > start)
            flags += inside.data
    ids += np.int32(eos).tobytes()
    stops += np.int32(len(document.text) + 1).tobytes()
    flags += bytes(annotate)
    tokens, places = np.frombuffer(ids, np.int32), np.frombuffer(stops, np.int32)
    return Encoded(tokens, places, np.frombuffer(flags, bool) if annotate else None)


@dataclass
class Read:
    """What has been read of a chunk: `rows`, none behind those of `source.rows`, and the `bad` ones with their
    reasons."""

    rows: int = 0
    bad: list[dict[str, Any]] = field(default_factory=list)


def token_tables(
    chunk: Chunk, source: Input, tokenizer: Any, *, first_input_row: int, annotate: bool, read: Read
) -> Iterator[pa.Table]:
    """Tokenise a chunk: tables `row, num_chars, tokens, stops, special_texts[, annotated]` of some documents each
    (`special_texts`: how often the text names a special token), one at least, of documents in reading order. They hold
    GROUP_CHARS characters, more where a document has more. `read` is filled as they are taken. Rows count from the
    chunk's first; `first_input_row` is that one's, for `source.rows`.
    """
    names = re.compile("|".join(map(re.escape, tokenizer.all_special_tokens)))
    good: list[RawDocument] = []
    characters, tables = 0, 0
    for document in _chosen(chunk, source, tokenizer, first_input_row, read):
        if good and characters + document.num_chars > GROUP_CHARS:
            yield _table(good, tokenizer, names, annotate=annotate)
            good, characters, tables = [], 0, tables + 1
        good.append(document)
        characters += document.num_chars
    if good or not tables:
        yield _table(good, tokenizer, names, annotate=annotate)


def _chosen(chunk: Chunk, source: Input, tokenizer: Any, first_input_row: int, read: Read) -> Iterator[RawDocument]:
    """The good documents among the rows that `source.rows` takes."""
    choice = RowChoice.of(source.rows)
    for document in itertools.islice(read_documents(chunk, source, first_row=0), choice.rows_from(first_input_row)):
        read.rows += 1
        if first_input_row + document.row not in choice:
            continue
        reason = document.reason or _unknown_token(document, tokenizer)
        if reason is None:
            yield document
        else:
            read.bad.append({"source": redact(chunk.name), "row": document.row, "reason": reason})


def _table(good: Sequence[RawDocument], tokenizer: Any, names: re.Pattern[str], *, annotate: bool) -> pa.Table:
    encoded = [_as_given(document.tokens, annotate=annotate) for document in good if document.tokens is not None]
    # none, where there are ids: an input has one kind
    encoded += tokenise([document for document in good if document.tokens is None], tokenizer, annotate=annotate)
    columns: dict[str, Any] = {
        "row": pa.array([document.row for document in good], type=pa.int64()),
        "num_chars": pa.array([document.num_chars for document in good], type=pa.int64()),
        "num_tokens": pa.array([len(document.tokens) for document in encoded], type=pa.int64()),
        "tokens": _lists([document.tokens for document in encoded], pa.int32()),
        "stops": _lists([document.stops for document in encoded], pa.int32()),
        "special_texts": pa.array([len(names.findall(document.text)) for document in good], type=pa.int64()),
    }
    if annotate:
        flags = [document.annotated for document in encoded if document.annotated is not None]
        columns["annotated"] = _lists(flags, pa.bool_())
    return pa.table(columns)


def _as_given(tokens: np.ndarray, *, annotate: bool) -> Encoded:
    """A document of token ids alone: a token counts as a character of its text, and the last one as what closes it."""
    stops = np.arange(1, len(tokens) + 1, dtype=np.int32)
    return Encoded(tokens, stops, np.zeros(len(tokens), bool) if annotate else None)


def _unknown_token(document: RawDocument, tokenizer: Any) -> str | None:
    if document.tokens is None or (largest := int(document.tokens.max())) < len(tokenizer):
        return None
    return f"token id {largest} is none of the tokenizer's {len(tokenizer)}"


def _lists(arrays: Sequence[np.ndarray], kind: pa.DataType) -> pa.Array:
    """A column of lists; of one array it is a view, where `kind` allows it."""
    bounds = np.concatenate([[0], np.cumsum([len(array) for array in arrays], dtype=np.int64)]).astype(np.int64)
    return pa.LargeListArray.from_arrays(pa.array(bounds), pa.array(_end_to_end(arrays), type=kind))


def _end_to_end(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Arrays as one; a single one is not copied."""
    if len(arrays) == 1:
        return arrays[0]
    return np.concatenate(arrays) if arrays else np.zeros(0, np.int32)


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


def running_total(counts: np.ndarray) -> np.ndarray:
    """(n,): of each of n counts the sum of those before it."""
    return np.asarray(np.cumsum(counts) - counts)


def pack(
    tokens: Sequence[np.ndarray], *, skip: int, num_tokens: int, block_size: int, fill: int
) -> tuple[np.ndarray, np.ndarray]:
    """Lay arrays end to end, leave out the first `skip` entries, keep `num_tokens`, cut into blocks.

    Returns (blocks_BT of the input's dtype, the last one filled up with `fill`; lengths_B int32).
    """
    stream = _end_to_end(tokens)[skip : skip + num_tokens]
    assert len(stream) == num_tokens, (len(stream), num_tokens)
    num_blocks = -(-num_tokens // block_size)
    blocks_BT = np.full((num_blocks, block_size), fill, dtype=stream.dtype)
    blocks_BT.reshape(-1)[:num_tokens] = stream
    lengths_B = np.full(num_blocks, block_size, dtype=np.int32)
    lengths_B[-1] = num_tokens - (num_blocks - 1) * block_size
    return blocks_BT, lengths_B
