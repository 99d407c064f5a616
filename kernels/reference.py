"""The mathematics of every kernel in plain torch: what the others are measured against.

Shapes: T tokens of a step, D hidden size, N output features, H query heads, KV key heads,
G = H / KV, d head size, E experts on this rank, k experts per token, I intermediate size of this
rank, S slots of the KV cache (block * block_size + offset). Sums, softmax and norms are in fp32.
Source of the model's mathematics: the gpt-oss model card, arXiv:2508.10925.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.mxfp4 import MXFP4, dequantize


@dataclass(frozen=True, slots=True)
class Rows:
    """One step's rows in one KV group: row r computes positions starts[r] .. + counts[r].

    Tensors of R are int64 on the CPU. Position p of row r is in block
    tables[lines[r]][p // block_size]; entries that the group's window has left, or past the last
    position, are never read. The cache holds ``zero_block`` beyond the pool: all of it is always 0.
    Rows of no tokens at the end are padding, and so are tokens beyond those of the rows.
    """

    starts: Tensor
    counts: Tensor
    lines: Tensor
    tables: Tensor  # int32 [lines, blocks] on the CPU
    resident: Tensor  # the same on the device
    tokens: int  # T
    block_size: int
    zero_block: int
    window: int = 0  # a token sees the last so many, itself included; 0: all
    chunk: int = 0  # a token sees those since the last multiple of it; 0: all

    def slots(self, row: Tensor | int, positions: Tensor) -> Tensor:
        """Slots of a row's positions (or of pairs of row and position)."""
        blocks = self.tables[self.lines[row], positions // self.block_size].long()
        return blocks * self.block_size + positions % self.block_size

    def written(self) -> Tensor:
        """[T] the slot that each new token's key and value go to; -1 for padding."""
        rows = torch.repeat_interleave(self.counts)
        before = self.counts.cumsum(0) - self.counts
        positions = torch.arange(len(rows)) - (before - self.starts)[rows]
        return F.pad(self.slots(rows, positions), (0, self.tokens - len(rows)), value=-1)

    def first_key(self, position: Tensor) -> Tensor:
        """The first position that a query at ``position`` sees; the last is its own."""
        if self.chunk:
            return position - position % self.chunk
        return (position - self.window + 1).clamp(min=0) if self.window else position * 0


@dataclass(frozen=True, slots=True)
class Span:
    """The queries of one row and the keys they see."""

    first: int  # index of its first token in the step
    count: int
    keys: Tensor  # int64 [L] slots
    visible: Tensor  # bool [count, L]


@dataclass(frozen=True, slots=True)
class Plan:
    """What attention needs to know of a step: computed once, used by all layers of a group."""

    slots: Tensor  # int64 [T]: where new keys and values go
    spans: Sequence[Span]


Put = Callable[[Tensor], Tensor]  # a tensor on the CPU, where the kernels run


def plan(rows: Rows, put: Put) -> Plan:
    spans = []
    at = 0
    for row, (start, count) in enumerate(
        zip(rows.starts.tolist(), rows.counts.tolist(), strict=True)
    ):
        query = torch.arange(start, start + count)[:, None]
        key = torch.arange(int(rows.first_key(query[0])), start + count)
        visible = (key <= query) & (key >= rows.first_key(query))
        spans.append(Span(at, count, put(rows.slots(row, key)), put(visible)))
        at += count
    return Plan(put(rows.written()), spans)


def rms_norm(x: Tensor, weight: Tensor, eps: float, round_first: bool = False) -> Tensor:
    """[T, D] -> [T, D] (arXiv:1910.07467), computed in fp32.

    gpt-oss multiplies by the weight while still fp32, Llama rounds to x's dtype first.
    """
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    return (y.to(x.dtype) * weight if round_first else y * weight).to(x.dtype)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, round_first: bool = False
) -> tuple[Tensor, Tensor]:
    """(norm of the sum, the sum), both [T, D]."""
    total = residual + x
    return rms_norm(total, weight, eps, round_first), total


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [T, K], weight [N, K], bias [N] -> [T, N]."""
    return F.linear(x, weight, bias)


def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate x [T, H, d] (arXiv:2104.09864): elements i and i + d/2, or 2 i and 2 i + 1.

    cos and sin are [T, 1, d] in x's dtype, for both elements of a pair: sin is negated for the
    first, so that a rotation is x * cos + (x with every pair swapped) * sin.
    """
    swapped = (
        x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        if interleaved
        else x.roll(x.shape[-1] // 2, -1)
    )
    return x * cos + swapped * sin


def rope_kv_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    interleaved: bool = False,
) -> Tensor:
    """Rotate q [T, H, d] and k [T, KV, d]; store k and v in the caches [S, KV, d] at ``slots``
    int64 [T]; return q. Caches may be fp8 (e4m3): what it cannot hold becomes its largest value.

    Padding has negative slots and is not stored, on devices that pad."""
    k = rope(k, cos, sin, interleaved)
    if k_cache.dtype == torch.float8_e4m3fn:
        k, v = (t.clamp(-448, 448).to(k_cache.dtype).view(torch.uint8) for t in (k, v))
        k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    k_cache.index_copy_(0, slots, k)
    v_cache.index_copy_(0, slots, v)
    return rope(q, cos, sin, interleaved)


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, plan: Plan, sinks: Tensor, scale: float
) -> Tensor:
    """Attention with a sink per head: q [T, H, d], caches [S, KV, d], sinks [H] -> [T, H * d].

    The sink takes part in the softmax with its own logit and no value, so weights sum to less
    than 1 (arXiv:2309.17453 motivates it; a learned logit per head is gpt-oss's form).
    """
    group = q.shape[1] // k_cache.shape[1]
    out = torch.empty_like(q)
    for span in plan.spans:
        rows = slice(span.first, span.first + span.count)
        k = k_cache[span.keys].float().repeat_interleave(group, dim=1)
        v = v_cache[span.keys].float().repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q[rows].float(), k) * scale
        scores = scores.masked_fill(~span.visible, -torch.inf)
        sink = sinks.float()[:, None, None].expand(-1, span.count, 1)
        p = torch.cat((scores, sink), dim=-1).softmax(dim=-1)[..., :-1]
        out[rows] = torch.einsum("hqk,khd->qhd", p, v).to(q.dtype)
    return out.flatten(1)


def route(logits: Tensor, k: int, slots: Tensor) -> tuple[Tensor, Tensor]:
    """[T, experts] -> ids int64 [T, k] and weights fp32 [T, k]: softmax over the top k only.

    A token whose KV slot (int64 [T]) is negative is padding and goes to no expert: its ids are -1.
    """
    top, ids = logits.topk(k, dim=-1)
    ids = ids.masked_fill_(slots[:, None] < 0, -1)
    return ids, top.softmax(dim=-1, dtype=torch.float32)


def swiglu(x: Tensor, limit: float, alpha: float) -> Tensor:
    """[..., 2 I] with gate and up interleaved -> [..., I]: gate * sigmoid(alpha gate) * (up + 1).

    The gate is clamped from above only.
    """
    gate, up = x[..., 0::2].float(), x[..., 1::2].float()
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (gate * torch.sigmoid(alpha * gate) * (up + 1)).to(x.dtype)


def pack(w: Tensor | MXFP4) -> Tensor | MXFP4:
    """The experts' matrices as ``experts`` wants them: here as they are."""
    return w


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
    """The weighted sum over those of each token's experts that live on this rank: [T, D].

    x [T, D], ids and weights [T, k] (global expert ids), w13 [E, 2 I, D], b13 [E, 2 I],
    w2 [E, D, I], b2 [E, D], for experts first .. first + E - 1. ``b2`` is None on the ranks that
    must not add it again when I is sharded. The weight multiplies the biased output.
    """
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for e in range(len(b13)):
        mine = torch.where(ids == first + e, weights, 0).sum(-1, keepdim=True)
        h = swiglu(F.linear(x, expert(w13, e, x.dtype), b13[e]), limit, alpha)
        y = F.linear(h, expert(w2, e, x.dtype), None if b2 is None else b2[e])
        total += torch.where(mine > 0, mine * y.float(), 0)
    return total.to(x.dtype)


def expert(w: Tensor | MXFP4, e: int, dtype: torch.dtype) -> Tensor:
    """The matrix of local expert ``e``, dequantised if it is packed."""
    return dequantize(MXFP4(w.blocks[e], w.scales[e]), dtype) if isinstance(w, MXFP4) else w[e]
