"""Which tokens of a packed block see each other, told to transformers instead of found by it.

With documents apart, a document in a block is read as if it were alone: no token sees another document, positions count
from its first token, and its first token has no prediction, as a block's has none. Training reads blocks so, and so do
factors and scores.

transformers looks in the position ids for documents packed end to end, and waits for the device to learn whether there
are any. Whoever calls a model here knows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, masking_utils

BEGINNINGS = 8  # rows are longer by a multiple of this, where a BOS stands before each document: few sizes to compile


@contextlib.contextmanager
def known_documents(document_BT: Tensor | None) -> Iterator[dict[str, Tensor]]:
    """Models called within, with the arguments that this gives, see only tokens of the same document: `document_BT` has
    its number, ascending, for every token; None: a block is one document."""
    original = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: document_BT
    try:
        yield {} if document_BT is None else {"position_ids": positions_in_document(document_BT)}
    finally:
        masking_utils.find_packed_sequence_indices = original


def begins_document(document_BT: Tensor) -> Tensor:
    """Boolean (B, T): the first token of each document in a block."""
    before_BT = F.pad(document_BT[:, :-1], (1, 0), value=-1)
    return document_BT != before_BT


def positions_in_document(document_BT: Tensor) -> Tensor:
    """int64 (B, T): how many tokens of its document stand before each token, in its block."""
    place_T = torch.arange(document_BT.shape[1], device=document_BT.device)
    return place_T - torch.where(begins_document(document_BT), place_T, 0).cummax(dim=1).values


def last_hidden_state(model: PreTrainedModel, tokens_BT: Tensor, document_BT: Tensor | None = None) -> Tensor:
    """What the LM head reads, (B, T, D) or what else flows through the model; documents see each other unless they are
    given, as in `known_documents`."""
    with known_documents(document_BT) as places:
        return model.base_model(tokens_BT, use_cache=False, **places).last_hidden_state


@torch.no_grad()
def keeps_documents_apart(model: PreTrainedModel) -> bool:
    """Whether documents in a block do not see each other where the model is told so: its family has masks for it. The
    model is in eval mode.

    A document's states must be those that it has alone, and stay as they are when the tokens of the document before it
    are others. They may change by rounding, as much as in a row of their own: experts take the tokens of all rows.
    """
    vocabulary = model.config.get_text_config().vocab_size
    tokens_BT = torch.arange(1, 9, device=model.device)[None] % vocabulary
    other_BT = torch.cat([(tokens_BT[:, :4] + 8) % vocabulary, tokens_BT[:, 4:]], dim=1)
    document_BT = torch.arange(8, device=model.device)[None] // 4
    packed = [last_hidden_state(model, given_BT, document_BT)[:, 4:] for given_BT in (tokens_BT, other_BT)]
    alone = [last_hidden_state(model, given_BT.view(2, 4))[1:] for given_BT in (tokens_BT, other_BT)]
    exact = packed[0].dtype in (torch.float32, torch.float64)
    size = alone[0].float().norm()
    return bool(
        _distance(*packed) <= 1e-6 * size + 2 * _distance(*alone)
        and _distance(packed[0], alone[0]) <= (1e-3 if exact else 5e-2) * size
    )


def _distance(one: Tensor, other: Tensor) -> Tensor:
    return (one.float() - other.float()).norm()


class Begun(NamedTuple):
    """Blocks with a BOS before each text in them: `tokens_BU`, `lengths_B` and `document_BU` as before, and where the
    blocks' own tokens are, int64 (B, T); None: where they were."""

    tokens_BU: Tensor
    lengths_B: Tensor
    document_BU: Tensor | None
    places_BT: Tensor | None

    def own(self, values: Tensor, dim: int) -> Tensor:
        """Those of the blocks' own tokens, of values (..., B, U, ...) with B at `dim`."""
        if self.places_BT is None:
            return values
        values = values.movedim((dim, dim + 1), (0, 1))
        return values[torch.arange(len(values), device=values.device)[:, None], self.places_BT].movedim(
            (0, 1), (dim, dim + 1)
        )


def begun(tokens_BT: Tensor, lengths_B: Tensor, document_BT: Tensor | None, beginning: int | None) -> Begun:
    """Put the token `beginning` before each block, or before each document in it where documents are given; None:
    nowhere."""
    if beginning is None:
        return Begun(tokens_BT, lengths_B, document_BT, None)
    if document_BT is None:
        place_T = torch.arange(1, tokens_BT.shape[1] + 1, device=tokens_BT.device)
        return Begun(F.pad(tokens_BT, (1, 0), value=beginning), lengths_B + 1, None, place_T.expand_as(tokens_BT))
    begins_BT = begins_document(document_BT)
    place_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
    places_BT = place_T + begins_BT.cumsum(dim=1)
    most = int(begins_BT.sum(dim=1).max())
    shape = len(tokens_BT), tokens_BT.shape[1] + -(-most // BEGINNINGS) * BEGINNINGS
    tokens_BU = tokens_BT.new_full(shape, beginning).scatter_(1, places_BT, tokens_BT)
    # The entry before each token first, which gives a BOS the document that it begins, and then the token's own.
    # What fills a row up is of documents of their own, so that no position is beyond those that the model has learned.
    filler_U = torch.arange(1, shape[1] + 1, device=document_BT.device)
    document_BU = (document_BT[:, -1:] + filler_U).scatter_(1, places_BT - 1, document_BT)
    document_BU.scatter_(1, places_BT, document_BT)
    lengths_B = lengths_B + (begins_BT & (place_T < lengths_B[:, None])).sum(dim=1)
    return Begun(tokens_BU, lengths_B, document_BU, places_BT)
