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


def token_stops(offset_mapping: Any, num_chars: int) -> Ints:
    """(n + 1,) int32: where each of n tokens stops, never before an earlier one, then EOS.

    `offset_mapping`: the (start, stop) characters of each token, as a fast tokenizer gives them.
    """
    stops = np.fromiter((stop for _, stop in offset_mapping), np.int32, count=len(offset_mapping))
    return np.append(np.maximum.accumulate(stops), np.int32(num_chars + 1)).astype(np.int32)


def token_edges(stops: Ints) -> Floats:
    """(n,) float64, strictly ascending: the edges of consecutive tokens of ONE document, from its `token_stops`.

    A part of a document may be given: edges are right but within a run of equal stops at either end of the part.
    """
    _, first, shared = np.unique(stops, return_index=True, return_counts=True)
    place = np.arange(len(stops)) - np.repeat(first, shared)  # among the tokens that stop at the same character
    return stops - (np.repeat(shared, shared) - 1 - place) / np.repeat(shared, shared)


def spans_of_mask(masked: Bools, edges: Floats) -> Floats:
    """(K, 2) float64 [start, stop): ascending, apart from each other, the parts of the masked tokens and no more."""
    changes = np.flatnonzero(np.diff(masked.astype(np.int8), prepend=0, append=0)).reshape(-1, 2)
    starts = _starts(edges)
    return np.stack([starts[changes[:, 0]], edges[changes[:, 1] - 1]], axis=1)


def mask_of_spans(spans: Floats, edges: Floats) -> Bools:
    """(n,) bool: the tokens whose part overlaps one of the `spans`, which are ascending and apart from each other."""
    if not len(spans):
        return np.zeros(len(edges), bool)
    first_behind_start = np.searchsorted(spans[:, 1], _starts(edges), side="right")
    reached = np.minimum(first_behind_start, len(spans) - 1)
    return (first_behind_start < len(spans)) & (spans[reached, 0] < edges)


def _starts(edges: Floats) -> Floats:
    return np.concatenate([[0.0 if len(edges) and edges[0] > 0 else -1.0], edges[:-1]])
