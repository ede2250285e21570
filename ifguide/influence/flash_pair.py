"""The attention of `paired_attention` as one Triton kernel, for GPUs: no weights in memory.

Tiles of keys are taken one after the other with a running maximum of the logits, as flash attention does
(arXiv 2205.14135), and here with the running mean of S' under P as well: with the weights so far, c the mean of S' and
p the exponentials, o' accumulates sum p (S' - c) v + p v'. A new mean c* adds (c - c*) sum p v to it. After the last
tile c is rowsum(P * S'), and what is rounded to bfloat16 were the small p (S' - c), as where weights are held whole.

Cost: 12 D FLOP for each query, visible key and direction: six products where attention alone has two. K directions
compute P anew for each.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)


@torch.library.custom_op("ifguide::flash_pair", mutates_args=())
def flash_pair(q: Tensor, k: Tensor, v: Tensor, softcap: float | None) -> Tensor:
    """Causal attention o and its changes o', (1 + K, B, T, H, D), in q's dtype.

    q (1 + K, B, H, T, D), scaled, and k and v (1 + K, B, H_kv, T, D): the values, then K changes of them.
    softcap c: logits are c tanh(q k^T / c).
    """
    q, k, v = (x.contiguous() for x in (q, k, v))
    streams, B, H, T, D = q.shape
    outputs = q.new_empty(streams, B, T, H, D)
    block_d = max(16, triton.next_power_of_2(D))
    queries, keys, warps, stages = _tiles(block_d)
    _attend[triton.cdiv(T, queries), B * H, streams - 1](
        q, k, v, outputs, B, H, k.shape[2], T, softcap or 1.0,
        D=D, BLOCK_D=block_d, QUERIES=queries, KEYS=keys, SOFTCAP=softcap is not None,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return outputs


@flash_pair.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, softcap: float | None) -> Tensor:
    streams, B, H, T, D = q.shape
    return q.new_empty(streams, B, T, H, D)


def _tiles(block_d: int) -> tuple[int, int, int, int]:
    """Queries and keys of a tile, warps, and stages of the pipeline: the best of eight on an H200 (bench/LOG.md)."""
    if block_d <= 64:
        return 64, 64, 4, 3
    return (128, 64, 8, 2) if block_d <= 128 else (64, 32, 8, 1)


@triton.jit
def _attend(
    q_ptr, k_ptr, v_ptr, out_ptr, B, H, H_kv, T, softcap,
    D: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head and direction; the longest rows are started first."""
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES
    head = tl.program_id(1).to(tl.int64)  # of B * H
    stream = tl.program_id(2).to(tl.int64) + 1
    queries = start + tl.arange(0, QUERIES)
    columns = tl.arange(0, BLOCK_D)
    inside = (queries < T)[:, None] & (columns < D)[None, :]
    at = q_ptr + (head * T + queries[:, None]) * D + columns[None, :]
    q = tl.load(at, mask=inside, other=0.0)
    q_change = tl.load(at + stream * B * H * T * D, mask=inside, other=0.0)
    key_head = head // (H // H_kv) * T * D
    key_stream = stream * B * H_kv * T * D

    highest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    mean = tl.zeros([QUERIES], tl.float32)
    out = tl.zeros([QUERIES, BLOCK_D], tl.float32)
    out_change = tl.zeros([QUERIES, BLOCK_D], tl.float32)
    for first in range(0, start, KEYS):
        highest, total, mean, out, out_change = _tile(
            q, q_change, k_ptr + key_head, v_ptr + key_head, key_stream, first, queries, columns, T, softcap,
            highest, total, mean, out, out_change, D, KEYS, SOFTCAP, False,
        )  # fmt: skip
    for first in range(start, tl.minimum(start + QUERIES, T), KEYS):
        highest, total, mean, out, out_change = _tile(
            q, q_change, k_ptr + key_head, v_ptr + key_head, key_stream, first, queries, columns, T, softcap,
            highest, total, mean, out, out_change, D, KEYS, SOFTCAP, True,
        )  # fmt: skip

    # (B, T, H, D) of each stream
    at = out_ptr + (((head // H) * T + queries[:, None]) * H + head % H) * D + columns[None, :]
    if tl.program_id(2) == 0:
        tl.store(at, (out / total[:, None]).to(out_ptr.dtype.element_ty), mask=inside)
    change = (out_change / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(at + stream * B * H * T * D, change, mask=inside)


@triton.jit
def _tile(
    q, q_change, k_ptr, v_ptr, key_stream, first, queries, columns, T, softcap,
    highest, total, mean, out, out_change,
    D: tl.constexpr, KEYS: tl.constexpr, SOFTCAP: tl.constexpr, DIAGONAL: tl.constexpr,
):  # fmt: skip
    """The running values with the keys `first` to `first + KEYS`; on the diagonal some are not visible."""
    keys = first + tl.arange(0, KEYS)
    offsets = keys[:, None] * D + columns[None, :]
    inside = (columns < D)[None, :]
    if DIAGONAL:
        inside = inside & (keys < T)[:, None]
    k = tl.load(k_ptr + offsets, mask=inside, other=0.0)
    k_change = tl.load(k_ptr + key_stream + offsets, mask=inside, other=0.0)
    v = tl.load(v_ptr + offsets, mask=inside, other=0.0)
    v_change = tl.load(v_ptr + key_stream + offsets, mask=inside, other=0.0)

    logits = tl.dot(q, tl.trans(k))
    slopes = tl.dot(q_change, tl.trans(k))
    slopes = tl.dot(q, tl.trans(k_change), slopes)
    if SOFTCAP:
        tanh = 2 * tl.sigmoid(2 * logits / softcap) - 1
        logits = softcap * tanh
        slopes = slopes * (1 - tanh * tanh)
    logits = logits * LOG2_E
    if DIAGONAL:
        logits = tl.where(keys[None, :] <= queries[:, None], logits, float("-inf"))

    higher = tl.maximum(highest, tl.max(logits, 1))
    shrink = tl.exp2(highest - higher)
    weights = tl.exp2(logits - higher[:, None])
    sum_before = total * shrink
    total = sum_before + tl.sum(weights, 1)
    new_mean = (mean * sum_before + tl.sum(weights * slopes, 1)) / total
    out = out * shrink[:, None]
    out_change = out_change * shrink[:, None] + (mean - new_mean)[:, None] * out
    changes = (weights * (slopes - new_mean[:, None])).to(v.dtype)
    weights = weights.to(v.dtype)
    out = tl.dot(weights, v, out)
    out_change = tl.dot(changes, v, out_change)
    out_change = tl.dot(weights, v_change, out_change)
    return higher, total, new_mean, out, out_change
