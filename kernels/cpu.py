"""Kernels for bf16 on CPU: few calls per layer, because at small batches the calls are the cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.mxfp4 import MXFP4
from kernels.reference import Put, Rows, expert

QUERIES = 128  # of one prefill tile: bounds the mask at 128 x context
GROUPED = 8  # pairs per expert up to which calls cost more than cache misses


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = residual + x
    return F.rms_norm(total, weight.shape, weight, eps), total


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


@dataclass(frozen=True, slots=True)
class _Work:
    """B sequences with Q queries each (one of B, Q is 1) and L keys."""

    rows: slice | Tensor  # the B * Q tokens
    shape: tuple[int, int, int]  # B, Q, L
    keys: Tensor  # int64 [B * L] slots; those that nobody may see lead to the zero block
    mask: Tensor | None  # added to the scores: [B, 1, 1, L] or [1, 1, Q, L], 0 or -inf


@dataclass(frozen=True, slots=True)
class WorkPlan:
    slots: Tensor  # int64 [T]
    work: Sequence[_Work]


def plan(rows: Rows, put: Put) -> WorkPlan:
    """Decoding rows of similar length together, prefilling rows in tiles of QUERIES."""
    first = rows.counts.cumsum(0) - rows.counts
    work = []
    single = torch.nonzero(rows.counts == 1)[:, 0]
    if len(single):
        lows = rows.first_key(rows.starts[single])
        lengths = rows.starts[single] + 1 - lows
        # Within a power of two from 128 up: padding at most doubles what is read.
        buckets = lengths.clamp(min=128).log2().ceil()
        for bucket in buckets.unique():
            chosen = buckets == bucket
            members = single[chosen]
            work.append(_decode(rows, members, first[members], lows[chosen], lengths[chosen]))
    for row in torch.nonzero(rows.counts > 1)[:, 0].tolist():
        start, count, token = int(rows.starts[row]), int(rows.counts[row]), int(first[row])
        for at in range(0, count, QUERIES):
            n = min(QUERIES, count - at)
            work.append(_prefill(rows, row, token + at, start + at, n))
    return WorkPlan(rows.written(), work)


def _decode(rows: Rows, members: Tensor, tokens: Tensor, lows: Tensor, lengths: Tensor) -> _Work:
    longest = int(lengths.max())
    key = torch.arange(longest)
    held = key < lengths[:, None]
    slots = rows.slots(members[:, None], torch.where(held, lows[:, None] + key, 0))
    slots = torch.where(held, slots, rows.zero_block * rows.block_size)
    mask = None
    if int(lengths.min()) < longest:
        mask = torch.zeros(held.shape, dtype=torch.bfloat16)
        mask = mask.masked_fill_(~held, -torch.inf)[:, None, None, :]
    n, at = len(members), int(tokens[0])
    index = slice(at, at + n) if int(tokens[-1]) - at == n - 1 else tokens
    return _Work(index, (n, 1, longest), slots.flatten(), mask)


def _prefill(rows: Rows, row: int, token: int, start: int, count: int) -> _Work:
    query = torch.arange(start, start + count)[:, None]
    key = torch.arange(int(rows.first_key(query[0])), start + count)
    hidden = (key > query) | (key < rows.first_key(query))
    mask = torch.zeros(hidden.shape, dtype=torch.bfloat16).masked_fill_(hidden, -torch.inf)
    keys = rows.slots(row, key)
    return _Work(slice(token, token + count), (1, count, len(key)), keys, mask[None, None])


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, plan: WorkPlan, sinks: Tensor, scale: float
) -> Tensor:
    """Flash attention without the sink, then its share taken off: sum_j exp(a_j) of the weights'
    denominator is known from the kernel's log-sum-exp, so weights scale by
    exp(lse) / (exp(lse) + exp(sink)) = sigmoid(lse - sink)."""
    tokens, heads, size = q.shape
    kv = k_cache.shape[1]
    group = heads // kv
    out = torch.empty_like(q)
    for work in plan.work:
        batch, queries, length = work.shape
        k = k_cache.index_select(0, work.keys).view(batch, length, kv, size)
        v = v_cache.index_select(0, work.keys).view(batch, length, kv, size)
        rows = q[work.rows]
        # The kernel wants as many KV heads as query heads: a group's queries share one KV head
        # either as its queries (decode) or by a stride of 0 (prefill).
        if queries == 1:
            x = rows.view(batch, kv, group, size)
            k, v, sink = k.transpose(1, 2), v.transpose(1, 2), sinks.view(kv, group)
        else:
            x = rows.view(queries, kv, group, size).permute(1, 2, 0, 3)
            k, v = k[0].transpose(0, 1)[:, None], v[0].transpose(0, 1)[:, None]
            k, v = k.expand(-1, group, -1, -1), v.expand(-1, group, -1, -1)
            sink = sinks.view(kv, group, 1)
        y, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            x, k, v, attn_mask=work.mask, scale=scale
        )
        y = y * torch.sigmoid(lse - sink)[..., None].to(y.dtype)
        y = y.reshape(batch, heads, size) if queries == 1 else y.permute(2, 0, 1, 3)
        out[work.rows] = y.reshape(-1, heads, size)
    return out.view(tokens, heads * size)


def swiglu(x: Tensor, limit: float, alpha: float) -> Tensor:
    """As the reference, to the bit. A pair is split as one integer: strided reads are twice slower
    than the arithmetic, and every pass over memory counts."""
    pair = x.view(torch.int32)  # gate in the low half
    gate = (pair << 16).view(torch.float32).clamp_(max=limit)
    up = (pair & -0x10000).view(torch.float32).clamp_(-limit, limit)
    return torch.sigmoid(gate * alpha).mul_(gate).mul_(up.add_(1)).to(x.dtype)


def experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    w13: Tensor | MXFP4,
    b13: Tensor,
    w2: Tensor | MXFP4,
    b2: Tensor | None,
    first: int,
    limit: float,
    alpha: float,
) -> Tensor:
    """Token-expert pairs sorted by expert. Few pairs go through all experts in two grouped
    products; many expert by expert, so that what lies between the products stays in the cache."""
    tokens, k = ids.shape
    local = len(b13)
    expert_of = ids.flatten() - first
    expert_of = torch.where((expert_of >= 0) & (expert_of < local), expert_of, local)
    counts = torch.bincount(expert_of, minlength=local + 1)[:local]
    pairs = int(counts.sum())
    order = expert_of.argsort(stable=True)
    place = order.argsort()  # of each pair among the sorted ones
    order = order[:pairs]
    rows = x.index_select(0, order // k)
    if isinstance(w13, MXFP4) or isinstance(w2, MXFP4) or pairs > GROUPED * local:
        y = torch.empty_like(rows)
        end = 0
        for e, count in enumerate(counts.tolist()):
            begin, end = end, end + count
            if count:
                h = F.linear(rows[begin:end], expert(w13, e, x.dtype), b13[e])
                h = swiglu(h, limit, alpha)
                bias = None if b2 is None else b2[e]
                y[begin:end] = F.linear(h, expert(w2, e, x.dtype), bias)
    else:
        expert_of = expert_of.index_select(0, order)
        ends = counts.cumsum(0, dtype=torch.int32)
        h = F.grouped_mm(rows, w13.transpose(1, 2), offs=ends) + b13.index_select(0, expert_of)
        y = F.grouped_mm(swiglu(h, limit, alpha), w2.transpose(1, 2), offs=ends)
        if b2 is not None:
            y += b2.index_select(0, expert_of)
    if pairs < len(place):  # pairs of other ranks' experts add a row of zeros
        y = F.pad(y, (0, 0, 0, 1))
        place.clamp_(max=pairs)
    y = y.index_select(0, place).float().view(tokens, k, -1)
    return torch.bmm(weights[:, None, :], y)[:, 0].to(x.dtype)
