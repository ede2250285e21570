"""A token mask as spans of characters, and back, with any tokenizer.

The tokens of a document tile its text: token j covers [edge of j-1, edge of j), its edge being the character at which
it stops. What a tokenizer leaves between two tokens (a space that its offsets trim) belongs to the later one. The EOS
that closes a document is one more character, behind its last. A character that n tokens share, as bytes of one emoji
do, is divided evenly among them, so that every token has a part of its own; one that stops before the first character
lies in [-1, 0).

A span is a union of neighbouring tokens' parts. A token is masked when its part overlaps a span; so the tokens that the
spans were made of, and no others of the same tokenization, are masked again.

Cost: linear in tokens and spans. It does not tokenise: stops come from the fast tokenizer that packed the corpus.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Ints = NDArray[np.int32]
Places = NDArray[np.int64]

FIRST = np.zeros(1, np.int64)  # one document alone begins at the first token


def token_stops(stops: Any, num_chars: int) -> Ints:
    """(n + 1,) int32: where each of n tokens stops, never before an earlier one, then EOS.

    `stops`: the character behind each token, as a fast tokenizer's offsets give it.
    """
    result = np.empty(len(stops) + 1, np.int32)
    np.maximum.accumulate(np.asarray(stops, np.int32), out=result[:-1])
    result[-1] = num_chars + 1
    return result


def token_edges(stops: Ints, begins: Places = FIRST) -> Floats:
    """(n,) float64: the edges of consecutive tokens, from their `token_stops`; strictly ascending in each document.

    `begins`: where the documents begin among these tokens, ascending from 0. Tokens may be missing at either end: the
    edges are right but within a run of equal stops there.
    """
    first = _runs(stops, begins)
    shared = np.diff(first, append=len(stops))  # tokens that stop at the same character
    behind = np.repeat(first + shared, shared) - np.arange(1, len(stops) + 1)
    return stops - behind / np.repeat(shared, shared)


def spans_of_mask(masked: Bools, edges: Floats, begins: Places = FIRST) -> Floats:
    """(K, 2) float64 [start, stop): the parts of the masked tokens and no more, apart from each other.

    No span goes from one document to the next; `begins` as in `token_edges`. `opens_span` tells whose they are.
    """
    closes = opens_span(masked[::-1], len(masked) - np.append(begins[1:], len(masked))[::-1])[::-1]
    return np.stack([_starts(edges, begins)[opens_span(masked, begins)], edges[closes]], axis=1)


def opens_span(masked: Bools, begins: Places = FIRST) -> Bools:
    """(n,): the first token of each of the spans that `spans_of_mask` gives."""
    goes_on = np.append(False, masked[:-1])
    goes_on[begins] = False
    return masked & ~goes_on


def mask_of_spans(spans: Floats, edges: Floats) -> Bools:
    """(n,) bool: the tokens whose part overlaps one of the `spans`, which are ascending and apart from each other."""
    if not len(spans):
        return np.zeros(len(edges), bool)
    first_behind_start = np.searchsorted(spans[:, 1], _starts(edges), side="right")
    reached = np.minimum(first_behind_start, len(spans) - 1)
    return (first_behind_start < len(spans)) & (spans[reached, 0] < edges)


def _starts(edges: Floats, begins: Places = FIRST) -> Floats:
    starts = np.concatenate([[0.0], edges[:-1]])
    starts[begins] = np.where(edges[begins] > 0, 0.0, -1.0)
    return starts


def _runs(stops: Ints, begins: Places) -> Places:
    """The first of the tokens of one document that stop at the same character, of each such run."""
    other = np.ones(len(stops), bool)
    other[1:] = stops[1:] != stops[:-1]
    other[begins] = True
    return np.flatnonzero(other)
