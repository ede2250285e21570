"""Held-out documents and texts for last words: read whole, and packed into blocks for perplexity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ifguide.config import ConfigError, Input
from ifguide.corpus.packing import pack, tokenise
from ifguide.corpus.reading import list_chunks, read_documents
from ifguide.records.choice import RowChoice
from ifguide.tokenizer import beginning_token


def read_rows(source: Input, dotted_key: str) -> list[Any]:
    """All good documents of an input, in order.

    Raises:
        ConfigError: `rows` that go past the last one. ValueError: a bad row, naming file and row; none is left out.
    """
    documents: list[Any] = []
    choice = RowChoice.of(source.rows)
    counted = 0
    for chunk in list_chunks(source, 0, chunk_bytes=2**62, dotted_key=f"{dotted_key}.path"):
        for document in read_documents(chunk, source, first_row=0):
            if counted >= choice.stop:  # a hub dataset would go on for all its rows
                return documents
            if counted in choice:
                if document.reason:
                    raise ValueError(f"{dotted_key}: {chunk.name} row {document.row}: {document.reason}")
                documents.append(document)
            counted += 1
    if lack := choice.lack_of(source.path, counted):
        raise ConfigError(f"{dotted_key}.rows: {lack}")
    if not documents:
        raise ValueError(f"{dotted_key}: no documents in {source.path}")
    return documents


def read_texts(source: Input, dotted_key: str) -> list[str]:
    """The texts of `read_rows`."""
    return [document.text for document in read_rows(source, dotted_key)]


def heldout_blocks(
    kinds: Sequence[Sequence[Any]], tokenizer: Any, width: int, *, special_tokens: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Documents as blocks of tokens (N, width), their lengths (N,), and the place in `kinds` of each block's (N,).

    No block holds documents of two kinds. With `special_tokens` each block begins with the BOS that the tokenizer puts
    before a text, if it does: for a model that was trained so, a text without it is no text that it knows.

    Raises:
        ValueError: they have fewer than two tokens.
    """
    start = beginning_token(tokenizer) if special_tokens else None
    parts = []
    for kind, documents in enumerate(kinds):
        tokens = [ids for ids, *_ in tokenise(documents, tokenizer, annotate=False)]
        count = sum(map(len, tokens))
        if count:
            size = width - (start is not None)
            blocks, lengths = pack(tokens, skip=0, num_tokens=count, block_size=size, fill=tokenizer.eos_token_id)
            if start is not None:
                blocks, lengths = np.insert(blocks, 0, start, axis=1), lengths + 1
            parts.append((blocks, lengths, np.full(len(blocks), kind)))
    if sum(lengths_N.sum() for _, lengths_N, _ in parts) < 2:
        raise ValueError("evaluate.heldout: the held-out documents have fewer than two tokens")
    blocks_NT, lengths_N, kinds_N = map(np.concatenate, zip(*parts, strict=True))
    return blocks_NT, lengths_N, kinds_N
