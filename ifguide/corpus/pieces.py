"""A long text in the tokens that it has as a whole, tokenised in pieces: a tokenizer takes 150 bytes a character.

Neighbouring windows overlap. Where both have the same tokens all over the middle of what they share, either is right
there, and the text is cut at a token of it: what a token becomes depends on what stands near it, and each window has
half a margin or more of that on both sides. Where they differ (a word longer than a margin, for instance) the window
grows by another piece, in the end to the whole text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

PIECE_CHARS = 1 << 18
MARGIN_CHARS = 1 << 12


class Tokens(NamedTuple):
    """Tokens of a text or of a part of it: ids (n,) int32, and the (start, stop) characters of each, (n, 2) int32."""

    ids: np.ndarray
    offsets: np.ndarray

    def part(self, first: int, last: int | None = None) -> Tokens:
        """The tokens [first, last)."""
        return Tokens(self.ids[first:last], self.offsets[first:last])

    def equals(self, other: Tokens) -> bool:
        """Whether they are the same tokens of the same characters."""
        return np.array_equal(self.ids, other.ids) and np.array_equal(self.offsets, other.offsets)

    def between(self, begin: int, end: int) -> tuple[int, int]:
        """The tokens [first, last) from the first that starts at `begin` or later to the last that stops by `end`."""
        behind = np.flatnonzero(self.offsets[:, 0] >= begin)
        first = int(behind[0]) if len(behind) else len(self.ids)
        over = np.flatnonzero(self.offsets[first:, 1] > end)
        return first, first + int(over[0]) if len(over) else len(self.ids)


def encode(texts: Sequence[str], tokenizer: Any) -> list[Tokens]:
    """The tokens of each text, tokenised whole, without special tokens around them."""
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=True,
        verbose=False,
    )
    return [
        Tokens(np.array(ids, np.int32), np.array(offsets, np.int32).reshape(-1, 2))
        for ids, offsets in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]


def encode_long(text: str, tokenizer: Any, *, piece: int = PIECE_CHARS, margin: int = MARGIN_CHARS) -> Iterator[Tokens]:
    """The tokens of a text in parts, end to end those of `encode`; memory is a few windows of `piece` characters."""
    begin, end = 0, min(piece, len(text))
    window = _encode_window(text, begin, end, tokenizer)
    done, yielded = 0, 0  # tokens of the window that stand in a part before; tokens of all parts
    while end < len(text):
        next_begin, next_end = max(end - 2 * margin, 0), min(end + piece, len(text))
        following = _encode_window(text, next_begin, next_end, tokenizer)
        cut = _common_token(window, following, next_begin + margin // 2, end - margin // 2)
        if cut is not None and cut[0] >= done:
            part = window.part(done, cut[0])
            yielded += len(part.ids)
            yield part
            begin, end, window, done = next_begin, next_end, following, cut[1]
            continue
        grown = _encode_window(text, begin, next_end, tokenizer)
        if not grown.part(0, done + 1).equals(window.part(0, done + 1)):
            (whole,) = encode([text], tokenizer)  # what stands far behind changes what stands before
            yield whole.part(yielded)
            return
        end, window = next_end, grown
    yield window.part(done)


def _encode_window(text: str, begin: int, end: int, tokenizer: Any) -> Tokens:
    (tokens,) = encode([text[begin:end]], tokenizer)
    tokens.offsets[:] += begin
    return tokens


def _common_token(left: Tokens, right: Tokens, begin: int, end: int) -> tuple[int, int] | None:
    """The places in both windows of a token of characters [begin, end), all of whose tokens they must have alike."""
    (left_first, left_last), (right_first, right_last) = left.between(begin, end), right.between(begin, end)
    count = left_last - left_first
    if count < 1 or not left.part(left_first, left_last).equals(right.part(right_first, right_last)):
        return None
    return left_first + count // 2, right_first + count // 2
