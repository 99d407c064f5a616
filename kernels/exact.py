"""fp32 kernels for CPU: a row's result never depends, not even in the last bit, on the batch.

Matrix libraries pick their order of summation by shape, so every product here has a fixed shape: 16
rows at a time, padded with zeros. Attention runs over tiles of 16 queries and 64 keys that lie at
fixed absolute positions, and sums over the key tiles from the first to the last. Elementwise
functions must not depend on an element's place in memory either; torch's exp does not, but its
sigmoid does (vector body and scalar tail round differently), so sigmoid is made of exp here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.mxfp4 import MXFP4
from kernels.reference import Put, Rows, expert

ROWS = 16
KEYS = 64


def _by_tiles(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``f`` of x [T, K] in tiles of exactly ROWS rows."""
    count = len(x)
    x = F.pad(x, (0, 0, 0, -count % ROWS))
    return torch.cat([f(tile) for tile in x.split(ROWS)])[:count]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _by_tiles(lambda tile: F.linear(tile, weight, bias), x)


@dataclass(frozen=True, slots=True)
class _KeyTile:
    """One tile of keys of every query tile that reaches so far."""

    active: int  # how many query tiles (they are sorted by their number of key tiles)
    slots: Tensor  # int64 [active * KEYS]
    visible: Tensor  # bool [active, 1, ROWS, 1, KEYS]


@dataclass(frozen=True, slots=True)
class TilePlan:
    slots: Tensor  # int64 [T]
    queries: Tensor  # int64 [tiles * ROWS]: the token at each tile row; T where there is none
    key_tiles: list[_KeyTile]
    gather: Tensor  # int64 [T]: the tile row of each token


def plan(rows: Rows, put: Put) -> TilePlan:
    tokens = rows.tokens
    tiles = []  # (number of key tiles, row, first query position, first key tile)
    for at, (begin, count) in enumerate(
        zip(rows.starts.tolist(), rows.counts.tolist(), strict=True)
    ):
        query = torch.arange(begin - begin % ROWS, begin + count, ROWS)
        nearest = rows.first_key(query.clamp(min=begin)) // KEYS
        farthest = ((query + ROWS).clamp(max=begin + count) - 1) // KEYS
        row = torch.full_like(query, at)
        tiles.append(torch.stack((farthest - nearest + 1, row, query, nearest)))
    described = torch.cat(tiles, 1)
    described = described[:, described[0].argsort(descending=True, stable=True)]
    reach, row, first, low = described
    before = rows.counts.cumsum(0) - rows.counts
    position = first[:, None] + torch.arange(ROWS)
    start, end = rows.starts[row][:, None], (rows.starts + rows.counts)[row][:, None]
    real = (position >= start) & (position < end)
    queries = torch.where(real, before[row][:, None] + position - start, tokens)
    gather = torch.empty(tokens, dtype=torch.int64)
    gather[queries[real]] = torch.nonzero(real.flatten())[:, 0]
    earliest = rows.first_key(torch.maximum(first, start[:, 0]))[:, None]
    key_tiles = []
    for step in range(int(reach[0])):
        active = int((reach > step).sum())
        of, pos = row[:active, None], position[:active]
        key = (low[:active, None] + step) * KEYS + torch.arange(KEYS)
        # Keys that no query here may see are read from the zero block: a stale slot may hold NaN.
        held = (key >= earliest[:active]) & (key < end[:active])
        slots = rows.slots(of, torch.where(held, key, 0))
        slots = torch.where(held, slots, rows.zero_block * rows.block_size)
        visible = (key[:, None, :] <= pos[:, :, None]) & real[:active, :, None]
        visible &= key[:, None, :] >= rows.first_key(pos)[:, :, None]
        key_tiles.append(_KeyTile(active, put(slots.flatten()), put(visible)[:, None, :, None, :]))
    return TilePlan(put(rows.written()), put(queries.flatten()), key_tiles, put(gather))


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, plan: TilePlan, sinks: Tensor, scale: float
) -> Tensor:
    """The softmax runs along the key tiles with a running maximum that starts at the sink."""
    _, heads, size = q.shape
    kv = k_cache.shape[1]
    group = heads // kv
    padded = torch.cat((q, q.new_zeros(1, heads, size)))[plan.queries]
    tiles = len(plan.queries) // ROWS
    shape = (tiles, ROWS, kv, group)
    q = padded.view(*shape, size).permute(0, 2, 1, 3, 4).reshape(tiles, kv, ROWS * group, size)
    m = sinks.float().view(kv, 1, group).expand(tiles, kv, ROWS, group)
    m = m.reshape(tiles, kv, ROWS * group, 1).clone()
    norm = torch.ones_like(m)
    total = torch.zeros_like(q)
    for tile in plan.key_tiles:
        n = tile.active
        k = k_cache.index_select(0, tile.slots).view(n, KEYS, kv, size).permute(0, 2, 3, 1)
        v = v_cache.index_select(0, tile.slots).view(n, KEYS, kv, size).transpose(1, 2)
        scores = _products(q[:n], k) * scale
        scores = scores.view(n, kv, ROWS, group, KEYS).masked_fill(~tile.visible, -torch.inf)
        scores = scores.view(n, kv, ROWS * group, KEYS)
        top = torch.maximum(m[:n], scores.amax(-1, keepdim=True))
        kept = torch.exp(m[:n] - top)
        p = torch.exp(scores - top)
        norm[:n] = norm[:n] * kept + p.sum(-1, keepdim=True)
        total[:n] = total[:n] * kept + _products(p, v)
        m[:n] = top
    out = (total / norm).view(tiles, kv, ROWS, group, size).permute(0, 2, 1, 3, 4)
    return out.reshape(tiles * ROWS, heads * size).index_select(0, plan.gather)


def _products(a: Tensor, b: Tensor) -> Tensor:
    """a [n, kv, M, K] @ b [n, kv, K, N], every product on its own: a batched call may split
    differently for another number of them."""
    out = a.new_empty(*a.shape[:3], b.shape[3])
    for x, y, z in zip(
        a.flatten(0, 1).unbind(), b.flatten(0, 1).unbind(), out.flatten(0, 1).unbind(), strict=True
    ):
        torch.mm(x, y, out=z)
    return out


def swiglu(x: Tensor, limit: float, alpha: float) -> Tensor:
    gate, up = x[..., 0::2].clamp(max=limit), x[..., 1::2].clamp(-limit, limit)
    return gate / (1 + torch.exp(-alpha * gate)) * (up + 1)


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
    """Each expert over tiles of its tokens; then the sum over a token's experts in order of k."""
    pairs = x.new_zeros(*ids.shape, x.shape[1])
    here = (ids >= first) & (ids < first + len(b13))
    for e in ids[here].unique().tolist():
        token, choice = torch.where(ids == e)
        up, down = expert(w13, e - first, x.dtype), expert(w2, e - first, x.dtype)
        in_bias, out_bias = b13[e - first], None if b2 is None else b2[e - first]

        def mlp(
            tile: Tensor,
            up: Tensor = up,
            down: Tensor = down,
            in_bias: Tensor = in_bias,
            out_bias: Tensor | None = out_bias,
        ) -> Tensor:
            return F.linear(swiglu(F.linear(tile, up, in_bias), limit, alpha), down, out_bias)

        pairs[token, choice] = _by_tiles(mlp, x[token])
    total = torch.zeros_like(x)
    for nth in range(ids.shape[1]):
        total += weights[:, nth, None] * pairs[:, nth]
    return total
