"""Causal attention of a pair of streams x+-, h +- step * h', with its products in low precision.

The difference of two attentions in bfloat16 would be rounding and nothing else, and float32 kernels are slow. So, as
for the linear maps, the streams are turned into sums and differences, and with S = q k^T, P = softmax(S)

    S' = q' k^T + q k'^T,   P' = P * (S' - rowsum(P * S')),   o = P v,   o' = P' v + P v'.

Queries are taken `QUERY_CHUNK` at a time, keys up to the chunk's end only: the weights in memory are
(B, heads, QUERY_CHUNK, T), and about half of the products beyond the diagonal are never computed.

It is registered with transformers under the name `PAIRED`, with the masks of `sdpa`. Grouped-query attention, sliding
windows (by mask) and soft caps are covered; dropout is not, nor are attention sinks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from ifguide.influence.fused import Kernels

PAIRED = "ifguide_paired"
QUERY_CHUNK = 128
_streams: ContextVar[tuple[int, torch.dtype, Kernels]] = ContextVar("streams")


@contextmanager
def pairs_of_streams(count: int, product_dtype: torch.dtype, kernels: Kernels) -> Iterator[None]:
    """Inside, batches are `count` pairs of streams, the outer dimensions (pair, sign, row)."""
    token = _streams.set((count, product_dtype, kernels))
    try:
        yield
    finally:
        _streams.reset(token)


def paired_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """query (2K B, H, T, D), key and value (2K B, H_kv, T, D) -> (2K B, T, H, D), by transformers' interface."""
    if options.get("s_aux") is not None:
        raise ValueError(f"{type(module).__name__}: attention sinks are not supported; score with engine forward")
    K, dtype, kernels = _streams.get()
    streams, H, T, D = query.shape
    B, groups = streams // (2 * K), key.shape[1]
    scaling = D**-0.5 if scaling is None else scaling
    # Sums are twice the value: a quarter here and a half in v make S, o and their changes come out unscaled.
    q, k, v = (
        kernels.mix(x.view(K, 2, B, *x.shape[1:]), dtype, scale)
        for x, scale in ((query, 0.25 * scaling), (key, 1.0), (value, 0.5))
    )
    q = q.view(1 + K, B * groups, H // groups, T, D)
    k, v = (x.view(1 + K, B * groups, T, D) for x in (k, v))
    k_pairs = [torch.cat([k[0], k[1 + i]], dim=-1).mT for i in range(K)]
    primal = torch.empty(B, H, T, D, dtype=dtype, device=query.device)
    changes = torch.empty(K, B, H, T, D, dtype=dtype, device=query.device)
    for start in range(0, T, QUERY_CHUNK):
        stop = min(start + QUERY_CHUNK, T)
        rows = q[:, :, :, start:stop].reshape(1 + K, B * groups, -1, D)
        allowed = _allowed(attention_mask, start, stop, B, H, groups, q.device)
        S = torch.bmm(rows[0], k[0, :, :stop].mT)
        S_change = [torch.bmm(torch.cat([rows[1 + i], rows[0]], dim=-1), k_pairs[i][:, :, :stop]) for i in range(K)]
        P, P_change = kernels.softmax_and_change(S, torch.stack(S_change), allowed, softcap)
        primal[:, :, start:stop] = torch.bmm(P, v[0, :, :stop]).view(B, H, -1, D)
        for i in range(K):
            change = torch.baddbmm(torch.bmm(P, v[1 + i, :, :stop]), P_change[i], v[0, :, :stop])
            changes[i, :, :, start:stop] = change.view(B, H, -1, D)
    output = kernels.unmix(primal.transpose(1, 2).reshape(-1, D), changes.transpose(2, 3).reshape(K, -1, D), None, None)
    return output.to(query.dtype).view(streams, T, H, D), None


def _allowed(mask: Tensor | None, start: int, stop: int, B: int, H: int, groups: int, device: torch.device) -> Tensor:
    """Where queries start..stop may look, broadcastable to (B * groups, H / groups * rows, stop)."""
    if mask is None:
        causal = torch.ones(stop - start, stop, dtype=torch.bool, device=device).tril(diagonal=start)
        return causal.repeat(H // groups, 1)[None]
    assert mask.dtype == torch.bool, "the masks of sdpa are boolean"
    rows = mask[:B, :, start:stop, :stop].expand(B, H, -1, -1)
    return rows.reshape(B * groups, -1, stop)


AttentionInterface.register(PAIRED, paired_attention)
AttentionMaskInterface.register(PAIRED, sdpa_mask)
