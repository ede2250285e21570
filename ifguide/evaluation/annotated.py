"""How much less likely annotated text is than the rest: what a model has unlearned, without sampling or a classifier.

Documents come with the spans that people marked. A token is annotated if it overlaps one. With the loss
l_j = -log p(x_j | x_<j), in nats,

    margin = mean l over the annotated tokens - mean l over the others

Some words are marked wherever they stand; a list of them raises the margin, too. So it is taken once more with token
types held equal: over the types w that have annotated uses A_w and others O_w,

    type margin = sum_w |A_w| (mean l over A_w - mean l over O_w) / sum_w |A_w|

Both are of one model. What a mask has done is their difference from the plain model's, of the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from ifguide.evaluation.bootstrap import Bootstrap, Replicates
from ifguide.evaluation.generation import evaluating
from ifguide.models import max_positions

CHUNK_FIGURES = 4_000_000  # sums by replicate and token type that are in memory at once


@dataclass(frozen=True, kw_only=True, eq=False)
class AnnotatedTokens:
    """N tokens of documents: `document_N` counts from 0 to `documents` - 1 (some may have no token); their ids, whether
    they are annotated, and their NLL in nats."""

    documents: int
    document_N: np.ndarray
    ids_N: np.ndarray
    annotated_N: np.ndarray
    nll_N: np.ndarray

    @classmethod
    def of(cls, table: pa.Table) -> AnnotatedTokens:
        """Of a row for each document, in the columns of `schemas.ANNOTATED`."""
        ids, annotated, nll = (table.column(name).combine_chunks() for name in ("tokens", "annotated", "nll"))
        return cls(
            documents=len(table),
            document_N=np.repeat(np.arange(len(table)), ids.value_lengths().to_numpy()),
            ids_N=ids.flatten().to_numpy(),
            annotated_N=annotated.flatten().to_numpy(zero_copy_only=False),
            nll_N=nll.flatten().to_numpy(),
        )


def token_nll(
    model: PreTrainedModel, documents: Sequence[np.ndarray], *, start: int, width: int, batch_size: int
) -> list[np.ndarray]:
    """NLL in nats of every token of every document, float64 (J,) each, in order.

    A document is read by itself behind the token `start`, in pieces of `width` tokens with it: of a longer one each
    piece begins anew. `batch_size` pieces at a time, of like lengths.

    Raises:
        ValueError: pieces of fewer than two tokens or of more than the model has positions; an NLL is NaN.
    """
    if not 2 <= width <= max_positions(model):
        raise ValueError(f"pieces of {width} tokens: they hold 2 at least, and {max_positions(model)} at most")
    pieces = [
        (place, begin, document[begin : begin + width - 1])
        for place, document in enumerate(documents)
        for begin in range(0, len(document), width - 1)
    ]
    pieces.sort(key=lambda piece: len(piece[2]))  # little padding
    nll = [np.zeros(len(document)) for document in documents]
    with evaluating(model):
        for first in range(0, len(pieces), batch_size):
            batch = pieces[first : first + batch_size]
            ids_BT = torch.full((len(batch), 1 + len(batch[-1][2])), start, device=model.device)
            for row, (_, _, ids) in enumerate(batch):
                ids_BT[row, 1 : 1 + len(ids)] = torch.from_numpy(ids.astype(np.int64))
            logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
            for row, (place, begin, ids) in enumerate(batch):
                # By row: a float32 copy of the whole batch's logits would double the peak memory.
                labels = ids_BT[row, 1 : 1 + len(ids)]
                nll_J = F.cross_entropy(logits_BTV[row, : len(ids)].float(), labels, reduction="none")
                nll[place][begin : begin + len(ids)] = nll_J.double().cpu().numpy()
    for place, values in enumerate(nll):
        if np.isnan(values).any():
            raise ValueError(f"the NLL of document {place} is NaN; the model has diverged")
    return nll


def annotated_figures(tokens: AnnotatedTokens, bootstrap: Bootstrap) -> dict[str, Replicates]:
    """`annotated_nll`, the mean NLL of the annotated tokens; `margin`; `type_margin`, NaN where no type has both uses.
    Replicates are of documents."""
    sums = {}
    for name, chosen_N in (("annotated", tokens.annotated_N), ("others", ~tokens.annotated_N)):
        of_documents = tokens.document_N[chosen_N]
        nll_D = np.bincount(of_documents, weights=tokens.nll_N[chosen_N], minlength=tokens.documents)
        sums[name] = (nll_D, np.bincount(of_documents, minlength=tokens.documents).astype(np.float64))
    means = bootstrap.ratios(sums)
    annotated, others = means["annotated"], means["others"]
    margin = Replicates(
        value=annotated.value - others.value, samples=annotated.samples - others.samples, n=tokens.documents
    )
    return {"annotated_nll": annotated, "margin": margin, "type_margin": _type_margin(tokens, bootstrap)}


def _type_margin(tokens: AnnotatedTokens, bootstrap: Bootstrap) -> Replicates:
    uses = _uses_by_type(tokens)
    step = max(1, CHUNK_FIGURES // max(1, len(uses[0])))
    draws = (
        chunk_SD[begin : begin + step]
        for chunk_SD in chain([np.ones((1, tokens.documents))], bootstrap.counts(tokens.documents))
        for begin in range(0, len(chunk_SD), step)
    )
    figures = np.concatenate([_of_types(uses, count_SD) for count_SD in draws])
    return Replicates(value=float(figures[0]), samples=figures[1:], n=tokens.documents)


def _uses_by_type(tokens: AnnotatedTokens) -> list[Tensor]:
    """Of the W types that have both uses, sparse (W, D) by document: annotated tokens, their NLL, other tokens, their
    NLL."""
    types_W = np.intersect1d(tokens.ids_N[tokens.annotated_N], tokens.ids_N[~tokens.annotated_N])
    kept_N = np.isin(tokens.ids_N, types_W)
    cell_2N = np.stack([np.searchsorted(types_W, tokens.ids_N[kept_N]), tokens.document_N[kept_N]])
    places, size = torch.from_numpy(cell_2N), (len(types_W), tokens.documents)
    annotated_N, nll_N = (torch.from_numpy(each_N[kept_N]).double() for each_N in (tokens.annotated_N, tokens.nll_N))
    return [
        torch.sparse_coo_tensor(places, weights_N, size, check_invariants=True).coalesce()
        for chosen_N in (annotated_N, 1 - annotated_N)
        for weights_N in (chosen_N, chosen_N * nll_N)
    ]


def _of_types(uses: Sequence[Tensor], count_SD: np.ndarray) -> np.ndarray:
    """The type margin of each draw of documents, (S,). Of a draw's types those count that have both uses in it."""
    count_DS = torch.from_numpy(count_SD.T)
    annotated_WS, annotated_nll_WS, others_WS, others_nll_WS = ((table @ count_DS).numpy() for table in uses)
    both_WS = (annotated_WS > 0) & (others_WS > 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        gap_WS = annotated_nll_WS / annotated_WS - others_nll_WS / others_WS
        total_S = np.where(both_WS, annotated_WS * gap_WS, 0.0).sum(axis=0)
        return total_S / np.where(both_WS, annotated_WS, 0.0).sum(axis=0)
