"""The training loss as a function of a model's logits, for any training loop.

It is the loss of `ifguide.training.lm_loss`, value and gradient, up to rounding. That one takes the LM head's input and
never holds all logits: use its `LanguageModelLoss` where they do not fit. Cost: as the ordinary loss.

Trainers of other libraries carry no mask to the loss, but all carry labels. So a mask can travel in them: the label of
a masked token x is -101 - x. An ordinary cross-entropy refuses such labels, so that no mask is lost unseen.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ifguide.config.pretrain import ObjectiveKind
from ifguide.models import IGNORE
from ifguide.training.objective import Objective

MASKED_ZERO = IGNORE - 1  # the label of a masked token 0


def objective(
    outputs: Any,
    labels_BT: Tensor,
    num_items_in_batch: int | Tensor | None = None,
    *,
    kind: ObjectiveKind = "clipped",
    penalty: float = 0.5,
    floor_probability: float = 1e-3,
) -> Tensor:
    """`signed_loss` with the mask in the labels: a trainer's own loss function, as transformers' `compute_loss_func`.

    outputs: of a causal LM, with `logits`; or the logits themselves.
    labels_BT: int64, not shifted, as `ifguide export-mask --format hf` writes them: a token's id, -101 minus its id
        where it is masked, -100 where no loss is wanted.
    num_items_in_batch: N, the labels of the whole step that are not -100; None counts this batch's.

    Raises:
        ValueError: as `signed_loss`.
    """
    masked_BT = labels_BT <= MASKED_ZERO
    return signed_loss(
        getattr(outputs, "logits", outputs),
        torch.where(masked_BT, MASKED_ZERO - labels_BT, labels_BT),
        masked_BT,
        kind=kind,
        penalty=penalty,
        floor_probability=floor_probability,
        token_count=num_items_in_batch,
    )


def signed_loss(
    logits_BTV: Tensor,
    labels_BT: Tensor,
    mask_BT: Tensor | None,
    *,
    kind: ObjectiveKind = "clipped",
    penalty: float = 0.5,
    floor_probability: float = 1e-3,
    token_count: int | Tensor | None = None,
) -> Tensor:
    """The loss that learns unmasked tokens and unlearns masked ones (Eq. 9 of IF-Guide, arXiv 2506.01790, and kin).

    With NLL_j = -log p(x_j | x_<j) in nats, `1/N [sum over unmasked j of NLL_j + penalty * sum over masked j of
    m(NLL_j)]`; m is -NLL for `kind="penalty"`, the paper's. `ifguide.training.objective` has all kinds.

    logits_BTV: as a causal LM gives them: position j predicts token j + 1.
    labels_BT: int64 token ids, as the input, not shifted; -100 where no loss is wanted (padding). Index 0 has none.
    mask_BT: bool, label aligned as ifguide's masks are: [b, j] speaks of predicting token j. None: nothing is masked.
    token_count: N; None counts the tokens of this batch that have a loss, masked ones too. A step of several
        micro-batches or ranks wants one count for all of them, so that their gradients add up to the step's; where
        gradients are averaged over ranks (DDP, FSDP), multiply the loss by the number of ranks. Several numbers, as
        transformers' `Trainer` has one for each device of a `DataParallel`, are added up.

    Returns a scalar with a gradient, float32 or wider. With nothing masked it is cross-entropy.

    Raises:
        ValueError: the shapes do not fit, or `kind`, `penalty` or `floor_probability` is out of range.
    """
    objective = Objective(kind=kind, penalty=penalty, floor_probability=floor_probability)
    if logits_BTV.shape[:2] != labels_BT.shape or (mask_BT is not None and mask_BT.shape != labels_BT.shape):
        mask_shape = None if mask_BT is None else tuple(mask_BT.shape)
        raise ValueError(
            f"logits {tuple(logits_BTV.shape)}, labels {tuple(labels_BT.shape)} and mask {mask_shape} must agree in"
            " their first two dimensions"
        )
    labels_N = labels_BT[:, 1:].flatten()
    counted_N = labels_N != IGNORE
    masked_N = torch.zeros_like(counted_N) if mask_BT is None else mask_BT[:, 1:].flatten()
    logits_NV = logits_BTV[:, :-1].flatten(0, 1).to(torch.promote_types(logits_BTV.dtype, torch.float32))
    nll_N = F.cross_entropy(logits_NV, labels_N, ignore_index=IGNORE, reduction="none")
    loss_N = _OfTokens.apply(nll_N, masked_N, objective)
    given = counted_N.sum().clamp(min=1) if token_count is None else token_count
    count = torch.as_tensor(given, device=nll_N.device).sum()
    return loss_N.masked_fill(~counted_N, 0).sum() / count.to(nll_N.dtype)


class _OfTokens(torch.autograd.Function):
    """Its gradient is the objective's own slope: autograd has another at the bound of `clipped` and where p is 1."""

    @staticmethod
    def forward(ctx: Any, nll_N: Tensor, masked_N: Tensor, objective: Objective) -> Tensor:
        value_N, slope_N = objective.of_tokens(nll_N, masked_N)
        ctx.save_for_backward(slope_N)
        return value_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_N: Tensor) -> tuple[Tensor, None, None]:
        (slope_N,) = ctx.saved_tensors
        return gradient_N * slope_N, None, None
