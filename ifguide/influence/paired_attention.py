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

PAIRED = "ifguide_paired"
QUERY_CHUNK = 128
_streams: ContextVar[tuple[int, torch.dtype]] = ContextVar("streams")


@contextmanager
def pairs_of_streams(count: int, product_dtype: torch.dtype) -> Iterator[None]:
    """Inside, batches are `count` pairs of streams, the outer dimensions (pair, sign, row)."""
    token = _streams.set((count, product_dtype))
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
    K, dtype = _streams.get()
    streams, H, T, D = query.shape
    B, groups = streams // (2 * K), key.shape[1]
    scaling = D**-0.5 if scaling is None else scaling
    # Sums are twice the value: a quarter here and a half in v make S, o and their changes come out unscaled.
    q = _mix(query * (0.25 * scaling), K, dtype).view(1 + K, B * groups, H // groups, T, D)
    k = _mix(key, K, dtype).view(1 + K, B * groups, T, D)
    v = _mix(value * 0.5, K, dtype).view(1 + K, B * groups, T, D)
    k_pairs = [torch.cat([k[0], k[1 + i]], dim=-1).mT for i in range(K)]
    output = torch.empty(2 * K, B, T, H, D, dtype=query.dtype, device=query.device)
    for start in range(0, T, QUERY_CHUNK):
        stop = min(start + QUERY_CHUNK, T)
        rows = q[:, :, :, start:stop].reshape(1 + K, B * groups, -1, D)
        weights, slope = _weights(
            rows[0], k[0, :, :stop], _allowed(attention_mask, start, stop, B, H, groups, q.device), softcap
        )
        low = weights.to(dtype)
        primal = torch.bmm(low, v[0, :, :stop]).to(query.dtype)
        for i in range(K):
            change = torch.bmm(torch.cat([rows[1 + i], rows[0]], dim=-1), k_pairs[i][:, :, :stop]).to(query.dtype)
            if slope is not None:
                change *= slope
            weighted = weights * change
            weighted.addcmul_(weights, weighted.sum(dim=-1, keepdim=True), value=-1)
            tangent = torch.bmm(low, v[1 + i, :, :stop])
            tangent = torch.baddbmm(tangent, weighted.to(dtype), v[0, :, :stop]).to(query.dtype)
            for sign, combine in enumerate((torch.add, torch.sub)):
                heads = combine(primal, tangent).view(B, H, stop - start, D)
                output[2 * i + sign, :, start:stop] = heads.transpose(1, 2)
    return output.view(streams, T, H, D), None


def _mix(x: Tensor, K: int, dtype: torch.dtype) -> Tensor:
    """(2K B, ...) streams -> (1 + K, B, ...): the sum of the first pair, and the difference of each."""
    streams = x.reshape(2 * K, -1, *x.shape[1:])
    mixed = torch.empty(1 + K, *streams.shape[1:], dtype=dtype, device=x.device)
    torch.add(streams[0], streams[1], out=mixed[0])
    for i in range(K):
        torch.sub(streams[2 * i], streams[2 * i + 1], out=mixed[1 + i])
    return mixed


def _allowed(mask: Tensor | None, start: int, stop: int, B: int, H: int, groups: int, device: torch.device) -> Tensor:
    """Where queries start..stop may look, broadcastable to (B * groups, H / groups * rows, stop)."""
    if mask is None:
        causal = torch.ones(stop - start, stop, dtype=torch.bool, device=device).tril(diagonal=start)
        return causal.repeat(H // groups, 1)[None]
    assert mask.dtype == torch.bool, "the masks of sdpa are boolean"
    rows = mask[:B, :, start:stop, :stop].expand(B, H, -1, -1)
    return rows.reshape(B * groups, -1, stop)


def _weights(q: Tensor, k: Tensor, allowed: Tensor, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """Attention weights, at least float32, and the derivative of the soft cap where there is one."""
    S = torch.bmm(q, k.mT).to(torch.promote_types(q.dtype, torch.float32))
    slope = None
    if softcap is not None:
        tanh = torch.tanh(S / softcap)
        S, slope = softcap * tanh, 1 - tanh.square()
    return S.masked_fill_(~allowed, -torch.inf).softmax(dim=-1), slope


AttentionInterface.register(PAIRED, paired_attention)
AttentionMaskInterface.register(PAIRED, sdpa_mask)
