"""Random masks of as many tokens as another mask has: of any tokens, or of the same types.

A mask of the same types differs from the other in where its tokens stand alone: what it does, the choice of types does,
without the context that influence has seen. Where the other mask has most uses of a type, most of the draw is the same
tokens. A draw of the uses that the other leaves out shares as few as there can be: only it tells places from types.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Bools = NDArray[np.bool_]


def random_tokens(masked: Bools, candidates: Bools, rng: np.random.Generator) -> Bools:
    """(n,) flags of as many `candidates` (n,) as are `masked` (n,), each as likely.

    Raises ValueError where there are fewer candidates."""
    drawn = np.zeros(len(masked), bool)
    drawn[rng.choice(np.flatnonzero(candidates), size=int(masked.sum()), replace=False)] = True
    return drawn


def random_of_types(
    tokens: NDArray[np.integer],
    masked: Bools,
    candidates: Bools,
    rng: np.random.Generator,
    *,
    others_first: bool = False,
) -> Bools:
    """(n,) flags of as many `candidates` (n,) of each token id as are `masked` (n,) of it, each as likely;
    `others_first`: of a masked one only where the others of its id do not suffice.

    tokens: the ids (n,). Raises ValueError, naming the id, where one has fewer candidates than masked tokens."""
    places = rng.permutation(np.flatnonzero(candidates))
    if others_first:
        places = places[np.argsort(masked[places], kind="stable")]
    places = places[np.argsort(tokens[places], kind="stable")]  # by id, in random order within each
    ids, begins, counts = np.unique(tokens[places], return_index=True, return_counts=True)
    wanted_ids, wanted = np.unique(tokens[masked], return_counts=True)
    missing = wanted_ids[~np.isin(wanted_ids, ids)]
    if len(missing):
        raise ValueError(f"token {missing[0]} is masked and has no candidate to draw from")
    rows = np.searchsorted(ids, wanted_ids)
    for row in np.flatnonzero(counts[rows] < wanted)[:1]:
        raise ValueError(f"token {wanted_ids[row]}: {wanted[row]} are masked, {counts[rows][row]} can be drawn")
    drawn = np.zeros(len(tokens), bool)
    first = np.repeat(begins[rows], wanted)
    within = np.arange(len(first)) - np.repeat(np.cumsum(wanted) - wanted, wanted)
    drawn[places[first + within]] = True
    return drawn
