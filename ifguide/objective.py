"""The penalised training loss: descend on ordinary tokens, ascend on masked ones.

Method (IF-Guide, arXiv 2506.01790, Eq. 9), with NLL_j = -log p(x_j | x_<j):

    L = [ sum over unmasked j of NLL_j - penalty * sum over masked j of NLL_j ] / N

N is ONE global count of predicted tokens: all ranks, all accumulation steps of an optimizer step. So the
gradients of micro-batches add (sum over accumulation steps, sum over ranks) to the gradient of the whole
batch. A trainer that averages over ranks must multiply by the number of ranks.

Alignment: masks, weights and NLL are label aligned, as scores are. Entry [b, j] speaks of predicting token j,
which the model does from the logits at j - 1. Index 0 has no prediction; it and padding carry no loss, no
gradient and no count, whatever the mask says there.

Cost: one float32 log-softmax of (B, T, V), as for the ordinary loss; the mask adds (B, T) work. No value is
read back from the device.

It does not bound the masked term: NLL can grow without limit, and `penalty` and the size of the mask are what
keep training stable.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ifguide.models import next_token_nll, predicted_positions


@dataclass(frozen=True, kw_only=True, eq=False)
class SignedLoss:
    """`loss` carries the gradient; the rest is detached, for logs. All are scalars on the logits' device.

    The sums are plain sums of NLL in nats: loss = (benign_sum - penalty * masked_sum) / token_count. The
    counts (int64) are this batch's; their sum over the global batch is the `token_count` to pass.
    """

    loss: Tensor
    benign_sum: Tensor
    masked_sum: Tensor
    benign_count: Tensor
    masked_count: Tensor


def token_weights(mask_BT: Tensor, penalty: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """(B, T) weight of each NLL_j: 1, or -penalty where the bool mask is set."""
    if penalty < 0:
        raise ValueError(f"penalty must be 0 or more, got {penalty}: the masked sum is subtracted already")
    return torch.ones_like(mask_BT, dtype=dtype).masked_fill(mask_BT, -penalty)


def signed_loss(
    logits_BTV: Tensor,
    tokens_BT: Tensor,
    mask_BT: Tensor | None,
    lengths_B: Tensor,
    *,
    penalty: float,
    token_count: int | Tensor,
) -> SignedLoss:
    """Eq. 9 for one micro-batch.

    `logits_BTV` are the model's for the whole block, `tokens_BT` int64, `mask_BT` bool and label aligned
    (None: nothing is masked), `lengths_B` the real tokens of each block, `token_count` the global N.
    Raises ValueError for a negative penalty or a shape that does not fit.
    """
    if logits_BTV.shape[:2] != tokens_BT.shape or (mask_BT is not None and mask_BT.shape != tokens_BT.shape):
        mask_shape = None if mask_BT is None else tuple(mask_BT.shape)
        raise ValueError(
            f"logits {tuple(logits_BTV.shape)}, tokens {tuple(tokens_BT.shape)} and mask {mask_shape} must "
            "agree in block count and block size: was the mask built for another corpus?"
        )
    predicted = predicted_positions(tokens_BT, lengths_B)
    masked = torch.zeros_like(predicted) if mask_BT is None else mask_BT & predicted
    benign = predicted & ~masked
    nll = next_token_nll(logits_BTV, tokens_BT, lengths_B)
    detached = nll.detach()
    return SignedLoss(
        loss=(token_weights(masked, penalty, nll.dtype) * nll).sum() / token_count,
        benign_sum=detached.masked_fill(~benign, 0).sum(),
        masked_sum=detached.masked_fill(~masked, 0).sum(),
        benign_count=benign.sum(),
        masked_count=masked.sum(),
    )
