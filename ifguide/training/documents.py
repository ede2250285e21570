"""Which tokens of a packed block see each other, told to transformers instead of found by it.

With documents apart, a document in a block is trained on as if it were alone: no token sees another document, positions
count from its first token, and its first token has no prediction, as a block's has none.

transformers looks in the position ids for documents packed end to end, and waits for the device to learn whether there
are any. Whoever calls a model here knows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import masking_utils


@contextlib.contextmanager
def known_documents(document_BT: Tensor | None) -> Iterator[None]:
    """Models called within see only tokens of the same document: `document_BT` has its number, ascending, for every
    token; None: a block is one document."""
    found = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: document_BT
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = found


def begins_document(document_BT: Tensor) -> Tensor:
    """Boolean (B, T): the first token of each document in a block."""
    before_BT = F.pad(document_BT[:, :-1], (1, 0), value=-1)
    return document_BT != before_BT


def positions_in_document(document_BT: Tensor) -> Tensor:
    """int64 (B, T): how many tokens of its document stand before each token, in its block."""
    place_T = torch.arange(document_BT.shape[1], device=document_BT.device)
    return place_T - torch.where(begins_document(document_BT), place_T, 0).cummax(dim=1).values
