"""LM head, cross-entropy and the objective in chunks of tokens, their gradient formed inside the chunk.

For a chunk of final hidden states H (n, d) and labels x, with z = f(H W^T + b), f that of `ifguide.lm_head`, and
a_n = l'(NLL_n) / N the objective's slope of each token,

    E = (softmax(z) - onehot(x)) * f'       dH = a * (E W)       dW += E^T (a * H)       db += E^T a

which is all that the backward pass needs, so logits are never whole and W is not kept. Sums are float32 (float64 for
a float64 model) whatever precision the products run in; dW adds up in it over the chunks.

Cost: 6 d V FLOP a token, as for the ordinary loss. Memory: `CHUNK_VALUES` logits, dH, and dW in float32; the ordinary
loss holds three times tokens * V. With one chunk size, all weights 1 is plain cross-entropy to the last bit.

Alignment: tokens, masks and NLL are label aligned, as scores are. Entry [b, j] speaks of predicting token j, which the
model does from the hidden state at j - 1. Index 0 has no prediction; it and padding carry no loss, no gradient and no
count, whatever the mask says there.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from ifguide.documents import keeps_documents_apart, last_hidden_state
from ifguide.lm_head import LMHead, chunks, not_understood, output_embedding
from ifguide.models import predicted_positions
from ifguide.training.choices import Choices
from ifguide.training.compiled import compiled_chunk
from ifguide.training.losses import Loss
from ifguide.training.objective import Objective

# Logits held at once: every chunk reads and writes the head's gradient, so they are many.
CHUNK_VALUES = {"cpu": 26 << 20, "cuda": 64 << 20}


class _Labels(NamedTuple):
    """Of each position: the token to predict, whether it carries a loss, whether it is masked; and N."""

    labels_N: Tensor
    counted_N: Tensor
    masked_N: Tensor
    token_count: Tensor

    def of(self, rows: slice) -> _Labels:
        """These positions alone."""
        return _Labels(self.labels_N[rows], self.counted_N[rows], self.masked_N[rows], self.token_count)


class _Terms(NamedTuple):
    """Of a chunk: each token's NLL and its part of the loss, and the gradient of the loss by W h + b, which is
    `error_NV`, times `scale_N` if there is one. No `error_NV`: it was not wanted."""

    nll_N: Tensor
    value_N: Tensor
    error_NV: Tensor | None
    scale_N: Tensor | None


class _Gradients(NamedTuple):
    """Of the loss; None by what needs none."""

    hidden_ND: Tensor | None
    weight_VD: Tensor | None
    bias_V: Tensor | None

    def add(self, rows: slice, chunk_ND: Tensor, weight_VD: Tensor, terms: _Terms) -> None:
        """Take in a chunk, which the rows are of, with hidden states and weights in the precision of products."""
        error_NV, scale_N = terms.error_NV, terms.scale_N
        assert error_NV is not None
        if self.bias_V is not None:
            dtype = self.bias_V.dtype
            self.bias_V.add_(error_NV.sum(dim=0, dtype=dtype) if scale_N is None else scale_N @ error_NV.to(dtype))
        error_NV = error_NV.to(chunk_ND.dtype)
        if self.hidden_ND is not None:
            product_ND = error_NV @ weight_VD
            torch.mul(product_ND, 1.0 if scale_N is None else scale_N[:, None], out=self.hidden_ND[rows])
        if self.weight_VD is not None:
            _add_product(self.weight_VD, error_NV, chunk_ND, scale_N, first=rows.start == 0)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        labelled: _Labels,
        objective: Objective,
        head: LMHead,
        chunk_tokens: int | None,
        with_gradient: bool,
        compiled: bool,
        taken_back_as_is: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.as_is, ctx.weight_dtype = taken_back_as_is, weight_VD.dtype
        dtype, products = torch.promote_types(hidden_ND.dtype, torch.float32), product_dtype(hidden_ND)
        by_hidden, by_weight, by_bias = (with_gradient and needed for needed in ctx.needs_input_grad[:3])
        gradients = _Gradients(
            torch.empty_like(hidden_ND) if by_hidden else None,
            torch.empty_like(weight_VD, dtype=dtype) if by_weight else None,
            torch.zeros_like(bias_V, dtype=dtype) if bias_V is not None and by_bias else None,
        )
        wanted = by_hidden or by_weight or by_bias
        terms_of = _compiled_terms if compiled and wanted else _terms
        nll_N = torch.empty(len(hidden_ND), dtype=dtype, device=hidden_ND.device)
        loss = torch.zeros((), dtype=dtype, device=hidden_ND.device)
        with torch.autocast(hidden_ND.device.type, enabled=False):  # a product into given memory would pass it by
            states_ND, product_VD = hidden_ND.to(products), weight_VD.to(products)
            bias = None if bias_V is None else bias_V.to(products)
            size = chunk_tokens or _even_chunks(states_ND, len(weight_VD))
            # a CPU gets such memory page by page, and gives it back at once: a tenth of the time
            scratch_NV = states_ND.new_empty(min(size, len(states_ND)), len(weight_VD))
            for rows in chunks(len(states_ND), size):
                chunk_ND = states_ND[rows]
                linear_NV = _linear(chunk_ND, product_VD, bias, out=scratch_NV[: len(chunk_ND)])
                terms = terms_of(linear_NV, labelled.of(rows), objective, head, wanted)
                nll_N[rows] = terms.nll_N
                loss += terms.value_N.sum()
                if wanted:
                    gradients.add(rows, chunk_ND, product_VD, terms)
        ctx.gradients = gradients
        ctx.mark_non_differentiable(nll_N)
        return loss / labelled.token_count.to(dtype), nll_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Any, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the loss was taken back twice; its gradients are freed the first time")
        hidden, weight, bias = (part if part is None or ctx.as_is else part.mul_(gradient) for part in ctx.gradients)
        ctx.gradients = None
        weight = None if weight is None else weight.to(ctx.weight_dtype)
        return hidden, weight, None if bias is None else bias.to(ctx.weight_dtype), *[None] * 7


def _linear(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, *, out: Tensor) -> Tensor:
    """W h + b, (N, V), in `out`."""
    if bias_V is None:
        return torch.mm(hidden_ND, weight_VD.T, out=out)
    return torch.addmm(bias_V, hidden_ND, weight_VD.T, out=out)


def _terms(linear_NV: Tensor, labelled: _Labels, objective: Objective, head: LMHead, with_gradient: bool) -> _Terms:
    """By torch's operators; W h + b is overwritten."""
    labels_N1 = labelled.labels_N[:, None]
    logits_NV, slope_NV = head.activate(linear_NV)
    in_place = logits_NV if logits_NV.device.type == "cpu" else None
    log_p_NV = torch.log_softmax(logits_NV, dim=-1, out=in_place)
    del logits_NV
    nll_N = -log_p_NV.gather(1, labels_N1).squeeze(1)
    value_N, by_nll_N = objective.of_tokens(nll_N, labelled.masked_N)
    value_N = value_N.masked_fill(~labelled.counted_N, 0)
    if not with_gradient:
        return _Terms(nll_N, value_N, None, None)
    scale_N = by_nll_N.masked_fill(~labelled.counted_N, 0) * (head.scale / labelled.token_count).to(nll_N.dtype)
    error_NV = log_p_NV.exp_().scatter_add_(1, labels_N1, -torch.ones_like(log_p_NV[:, :1]))
    if slope_NV is not None:
        error_NV *= slope_NV
    return _Terms(nll_N, value_N, error_NV, scale_N)


def _compiled_terms(linear_NV: Tensor, labelled: _Labels, objective: Objective, head: LMHead, _: bool) -> _Terms:
    """By one kernel, which leaves the gradient by W h + b in its place."""
    labels_N, counted_N, masked_N, token_count = labelled
    at_labels = (torch.arange(len(labels_N), device=labels_N.device), labels_N)
    factor = (head.scale / token_count).to(torch.promote_types(linear_NV.dtype, torch.float32))
    rest = (counted_N, masked_N, objective, head, factor)
    nll_N, value_N, error_N = compiled_chunk()(linear_NV, linear_NV[at_labels], *rest)
    # What is left in the logits' place is the rest of the gradient. (`scatter_` would copy all of it in bfloat16.)
    error_NV = linear_NV.index_put_(at_labels, error_N.to(linear_NV.dtype))
    return _Terms(nll_N, value_N, error_NV, None)


def product_dtype(hidden_ND: Tensor) -> torch.dtype:
    """What the head's products run in."""
    device = hidden_ND.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_ND.dtype


def _even_chunks(states_ND: Tensor, vocabulary: int) -> int:
    """Tokens of a chunk: as many bytes of logits as `CHUNK_VALUES` in float32, all chunks of nearly one size."""
    values = CHUNK_VALUES.get(states_ND.device.type, CHUNK_VALUES["cuda"]) * 4 // states_ND.element_size()
    count = max(1, math.ceil(len(states_ND) * vocabulary / values))
    return math.ceil(len(states_ND) / count)


def _add_product(total_VD: Tensor, error_NV: Tensor, hidden_ND: Tensor, scale_N: Tensor | None, *, first: bool) -> None:
    """total += error^T (scale * hidden), added in the total's precision; the first one overwrites what was there."""
    scaled_ND = hidden_ND if scale_N is None else (hidden_ND * scale_N[:, None]).to(error_NV.dtype)
    if total_VD.dtype == error_NV.dtype:
        total_VD.addmm_(error_NV.T, scaled_ND, beta=0 if first else 1)
    elif first:
        total_VD.copy_(error_NV.T @ scaled_ND)
    else:
        total_VD += error_NV.T @ scaled_ND


def chunked_loss(
    hidden_BTD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    tokens_BT: Tensor,
    mask_BT: Tensor | None,
    lengths_B: Tensor,
    *,
    objective: Objective,
    token_count: int | Tensor,
    head: LMHead | None = None,
    chunk_tokens: int | None = None,
    document_BT: Tensor | None = None,
    compiled: bool = False,
    taken_back_as_is: bool = False,
) -> Loss:
    """The objective of one micro-batch from its final hidden states.

    `tokens_BT` int64, `mask_BT` bool and label aligned (None: nothing is masked), `lengths_B` the real tokens of each
    block, `token_count` the global N, `chunk_tokens` the positions at a time (None: by device). `document_BT`: the
    number of each token's document, whose first token then has no prediction. `compiled`: softmax, loss and mask by one
    compiled kernel. `taken_back_as_is`: the caller takes back the loss itself, so the gradient by it is 1 and need not
    be multiplied by. Raises ValueError for shapes that do not fit.
    """
    if hidden_BTD.shape[:2] != tokens_BT.shape or (mask_BT is not None and mask_BT.shape != tokens_BT.shape):
        mask_shape = None if mask_BT is None else tuple(mask_BT.shape)
        raise ValueError(
            f"hidden states {tuple(hidden_BTD.shape)}, tokens {tuple(tokens_BT.shape)} and mask {mask_shape} must "
            "agree in block count and block size: was the mask built for another corpus?"
        )
    predicted = predicted_positions(tokens_BT, lengths_B, document_BT)
    masked = torch.zeros_like(predicted) if mask_BT is None else mask_BT & predicted

    def shifted(values_BT: Tensor) -> Tensor:
        return F.pad(values_BT[:, 1:], (0, 1)).flatten()

    counted_N, masked_N = shifted(predicted), shifted(masked)
    labelled = _Labels(shifted(tokens_BT), counted_N, masked_N, _as_double(token_count, hidden_BTD.device))
    loss, nll_N = _ChunkedLoss.apply(
        hidden_BTD.flatten(0, 1),
        weight_VD,
        bias_V,
        labelled,
        objective,
        head or LMHead(),
        chunk_tokens,
        torch.is_grad_enabled(),  # inside a Function it never is, and its inputs need gradients all the same
        compiled,
        taken_back_as_is,
    )
    return Loss(
        loss=loss,
        benign_sum=nll_N.masked_fill(~(counted_N & ~masked_N), 0).sum(),
        masked_sum=nll_N.masked_fill(~masked_N, 0).sum(),
        benign_count=(counted_N & ~masked_N).sum(),
        masked_count=masked_N.sum(),
    )


def _as_double(count: int | Tensor, device: torch.device) -> Tensor:
    """float32 would round it. A number is written by the device itself: the host does not wait for a copy."""
    if isinstance(count, Tensor):
        return count.to(device).double()
    return torch.full((), float(count), dtype=torch.float64, device=device)


class LanguageModelLoss(nn.Module):
    """A causal LM that returns the objective instead of logits: what an engine trains.

    The head's `forward` is replaced, so that the chunks run inside it: whatever an engine does around a module's
    forward pass (ZeRO-3 gathers the module's weights for it) still happens. Called with hidden states alone, as by
    the model itself, the head gives logits as before.

    Raises:
        ValueError: the output embedding is no nn.Linear; `check` also when the logits are not f(W h + b), f known.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        objective: Objective,
        *,
        chunk_tokens: int | None = None,
        compiled: bool = False,
    ):
        super().__init__()
        linear = output_embedding(model)
        self.head = head = LMHead.of(model)
        self.model = model
        self.objective = objective
        self.choices: Choices | None = None  # of whoever built it
        self.taken_back_as_is = False  # an engine may say so: see `chunked_loss`
        plain = linear.forward

        def forward(hidden_BTD: Tensor, **batch: Any) -> Tensor | tuple[Tensor, ...]:
            if not batch:
                return plain(hidden_BTD)
            loss = chunked_loss(
                hidden_BTD,
                linear.weight,
                linear.bias,
                **batch,
                head=head,
                chunk_tokens=chunk_tokens,
                compiled=compiled,
                taken_back_as_is=self.taken_back_as_is,
            )
            return loss.loss, loss.benign_sum, loss.masked_sum, loss.benign_count, loss.masked_count

        linear.forward = forward  # type: ignore[method-assign, assignment]

    def forward(
        self,
        tokens_BT: Tensor,
        lengths_B: Tensor,
        mask_BT: Tensor | None,
        token_count: int | Tensor,
        document_BT: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """The fields of `Loss` in order, as a tuple: engines look for tensors in tuples, not in dataclasses.

        document_BT: the number of each token's document, ascending; documents then do not see each other.
        """
        hidden_BTD = last_hidden_state(self.model, tokens_BT, document_BT)
        return self.model.get_output_embeddings()(
            hidden_BTD,
            tokens_BT=tokens_BT,
            mask_BT=mask_BT,
            lengths_B=lengths_B,
            objective=self.objective,
            token_count=token_count,
            document_BT=document_BT,
        )

    @torch.no_grad()
    def check(self, *, documents: bool = False) -> None:
        """Raises ValueError when the model's own logits are not those of this loss: a head that is not understood; or,
        with `documents`, when its family has no attention within documents."""
        vocabulary = self.model.config.get_text_config().vocab_size
        device = next(self.model.parameters()).device
        tokens_BT = torch.arange(1, 9, device=device)[None] % vocabulary
        training = self.model.training
        self.model.eval()  # dropout would differ
        logits_TV = self.model(input_ids=tokens_BT, use_cache=False).logits[0]
        linear = output_embedding(self.model)
        linear_TV = linear(last_hidden_state(self.model, tokens_BT)[0].to(linear.weight.dtype))
        apart = not documents or keeps_documents_apart(self.model)
        self.model.train(training)
        tolerance = 2e-2 if linear_TV.dtype == torch.bfloat16 else 1e-3
        error_TV = self.head.activate(linear_TV)[0].float() - logits_TV.float()
        if not error_TV.norm() <= tolerance * logits_TV.float().norm():
            raise not_understood(self.model, "target")
        if not apart:
            raise ValueError(
                f"pretrain.document_attention: {type(self.model).__name__} lets documents of a block see each other;"
                " set it to false, or choose a target of another family"
            )
