"""Causal attention of a pair of streams x+-, h +- step * h', with its products in low precision.

The difference of two attentions in bfloat16 would be rounding and nothing else, and float32 kernels are slow. So, as
for the linear maps, the streams are turned into sums and differences, and with S = q k^T, P = softmax(S)

    S' = q' k^T + q k'^T,   P' = P * (S' - rowsum(P * S')),   o = P v,   o' = P' v + P v'.

Queries are taken `QUERY_CHUNK` at a time, keys up to the chunk's end only: the weights in memory are
(B, heads, QUERY_CHUNK, T), and about half of the products beyond the diagonal are never computed. Kernels that
with a `flash` (`flash_pair`, on a GPU) attend by it where the mask is causal and nothing else.

Where there is one stream (`paired_blocks`), torch's own kernels attend, in the same precision.

It is registered with transformers under the name `PAIRED`, with the masks of `sdpa`. Grouped-query attention, sliding
windows (by mask) and soft caps are covered; dropout is not, nor are attention sinks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ifguide.influence.fused import Kernels, pairs, stacked, unmix
from ifguide.influence.fused import kernels as fused_kernels

PAIRED = "ifguide_paired"
QUERY_CHUNK = 128
ONE_STREAM = 0  # in place of a number of pairs
# What the streams of the pass in hand are. (Not a ContextVar: graphs with one in them cannot be compiled.)
_streams: list[tuple[int, torch.dtype, Kernels]] = []


@contextmanager
def pairs_of_streams(count: int, product_dtype: torch.dtype, kernels: Kernels) -> Iterator[None]:
    """Inside, batches are `count` pairs of streams, the outer dimensions (pair, sign, row); or rows alone, where it is
    `ONE_STREAM`."""
    _streams.append((count, product_dtype, kernels))
    try:
        yield
    finally:
        _streams.pop()


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
    """query (2K B, H, T, D), key and value (2K B, H_kv, T, D) -> (2K B, T, H, D), by transformers' interface. Of one
    stream: as if 2K were 1."""
    if options.get("s_aux") is not None:
        raise ValueError(f"{type(module).__name__}: attention sinks are not supported; score with engine forward")
    K, dtype, kernels = _streams[-1]
    if K == ONE_STREAM:
        if softcap is not None:  # torch's kernels have none: as a pair of equal streams
            q, k, v = (torch.cat([x, x]) for x in (query, key, value))
            output = _attend(q, k, v, attention_mask, scaling, softcap, 1, dtype, kernels)
            return output[: len(query)], None
        q, k, v = (x.to(dtype) for x in (query, key, value))
        output, _ = sdpa_attention_forward(module, q, k, v, attention_mask, scaling=scaling, **options)
        return output.to(query.dtype), None
    return _attend(query, key, value, attention_mask, scaling, softcap, K, dtype, kernels), None


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
    softcap: float | None,
    K: int,
    dtype: torch.dtype,
    kernels: Kernels,
) -> Tensor:
    """As `paired_attention`, of K pairs."""
    streams, H, T, D = query.shape
    scaling = D**-0.5 if scaling is None else scaling
    # Sums are twice the value: a quarter here and a half in v make S, o and their changes come out unscaled.
    q, k, v = (
        kernels.mix(pairs(x, K), dtype, scale).contiguous()
        for x, scale in ((query, 0.25 * scaling), (key, 1.0), (value, 0.5))
    )
    if kernels.flash is not None and attention_mask is None:
        outputs = kernels.flash(q, k, v, softcap)
    elif torch.compiler.is_compiling():
        outputs = _chunks_of_a_graph(q, k, v, attention_mask, softcap)
    else:
        outputs = _in_chunks(q, k, v, attention_mask, softcap, kernels)
    output = unmix(outputs[0], outputs[1:], None, None)
    return output.to(query.dtype).view(streams, T, H, D)


@torch.library.custom_op("ifguide::attention_in_chunks", mutates_args=())
def _chunks_of_a_graph(q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, softcap: float | None) -> Tensor:
    """`_in_chunks` as one operation of a compiled graph, not unrolled in it."""
    return _in_chunks(q, k, v, attention_mask, softcap, fused_kernels(fused=True, device_type=q.device.type))


@_chunks_of_a_graph.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, softcap: float | None) -> Tensor:
    streams, B, H, T, D = q.shape
    return q.new_empty(streams, B, T, H, D)


def _in_chunks(
    q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, softcap: float | None, kernels: Kernels
) -> Tensor:
    """q (1 + K, B, H, T, D), k and v (1 + K, B, H_kv, T, D) -> o and its changes (1 + K, B, T, H, D)."""
    K, B, H, T, D = q.shape[0] - 1, *q.shape[1:]
    groups = k.shape[2]
    # Rows of one key head: queries in order, each with its H / groups heads, so that a chunk of queries is a slice.
    q = q.view(1 + K, B * groups, H // groups, T, D).transpose(2, 3).reshape(1 + K, B * groups, -1, D)
    k, v = (x.view(1 + K, B * groups, T, D) for x in (k, v))
    operands = [(torch.cat([q[1 + i], q[0]], dim=-1), torch.cat([k[0], k[1 + i]], dim=-1)) for i in range(K)]
    outputs = torch.empty_like(q)
    for start in range(0, T, QUERY_CHUNK):
        stop = min(start + QUERY_CHUNK, T)
        rows = slice(start * (H // groups), stop * (H // groups))
        mask = _additive(attention_mask, start, stop, B, H, groups, q.device)
        S = torch.bmm(q[0, :, rows], _prefix(k[0], stop).mT)
        S_change = [torch.bmm(q_pair[:, rows], _prefix(k_pair, stop).mT) for q_pair, k_pair in operands]
        P, P_change = kernels.softmax_and_change(S, stacked(S_change), mask, softcap)
        values = _prefix(v[0], stop)
        outputs[0, :, rows] = torch.bmm(P, values)
        for i in range(K):
            outputs[1 + i, :, rows] = torch.baddbmm(torch.bmm(P, _prefix(v[1 + i], stop)), P_change[i], values)
    # (1 + K, B, groups, T, H / groups, D) -> (1 + K, B, T, H, D)
    outputs = outputs.view(1 + K, B, groups, T, H // groups, D).permute(0, 1, 3, 2, 4, 5)
    return outputs.reshape(1 + K, B, T, H, D).contiguous()


def _prefix(x: Tensor, stop: int) -> Tensor:
    """The first `stop` rows of each of (N, T, D), next to each other: products copy (and transpose) what is not."""
    return x[:, :stop].contiguous()


def _additive(mask: Tensor | None, start: int, stop: int, B: int, H: int, groups: int, device: torch.device) -> Tensor:
    """0 where queries start..stop may look, else -inf; broadcastable to (B * groups, rows of the chunk, stop)."""
    if mask is None:
        causal = torch.full((stop - start, stop), -torch.inf, device=device).triu(start + 1)
        return causal.repeat_interleave(H // groups, dim=0)[None]
    assert mask.dtype == torch.bool, "the masks of sdpa are boolean"
    allowed = mask[:B, :, start:stop, :stop].expand(B, H, -1, -1)
    allowed = allowed.reshape(B, groups, -1, *allowed.shape[2:]).transpose(2, 3).reshape(B * groups, -1, stop)
    return torch.zeros_like(allowed, dtype=torch.float32).masked_fill_(~allowed, -torch.inf)


AttentionInterface.register(PAIRED, paired_attention)
AttentionMaskInterface.register(PAIRED, sdpa_mask)
