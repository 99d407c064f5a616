"""Paged attention in Triton: chunked prefill and decode in one batch, sinks, windows, split keys.

Online softmax over tiles of keys (arXiv:2205.14135). A program handles the query heads that share
a KV head, for one query (decode) or several (prefill), as the rows of one tile. Keys of a decoding
row may be split over programs; ``_combine`` then adds up the parts.

Batch invariance: key tiles and spans lie at multiples of KEYS and SPAN from the sequence's start, a
tile in which a row sees nothing leaves it as it was to the bit, and the parts of a split are added
in order, with the very arithmetic that a prefilling program uses at the end of each span. So with
SPAN set, a row's result is the same however it was batched, chunked or split.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.configurations import Attention
from kernels.launch import launch
from kernels.reference import Put, Rows

LOG2_E = 1.4426950408889634


@dataclass(frozen=True, slots=True)
class Tiles:
    """Programs of equal shape: each takes ``queries`` tokens of one row."""

    rows: Tensor  # int32 [N]: of the step
    offsets: Tensor  # int32 [N]: the first query, counted from the row's start
    decode: bool
    splits: int  # programs that share a row's keys


@dataclass(frozen=True, slots=True)
class PagedPlan:
    """A step in one KV group on the device."""

    slots: Tensor  # int64 [T]
    tables: Tensor  # int32 [lines, blocks]
    lines: Tensor  # int32 [R]
    starts: Tensor  # int32 [R]
    counts: Tensor  # int32 [R]
    firsts: Tensor  # int32 [R]: index of a row's first token in the step
    tiles: tuple[Tiles, ...]
    block_size: int
    window: int
    chunk: int
    config: Attention

    @property
    def key(self) -> tuple[tuple[bool, int, int], ...]:
        """What a captured graph depends on: the grids."""
        return tuple((each.decode, len(each.rows), each.splits) for each in self.tiles)


@triton.jit
def _first_key(position, WINDOW: tl.constexpr, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    first = position * 0
    if WINDOW:
        first = tl.maximum(position - WINDOW + 1, 0)
    if CHUNK:
        first = position // CHUNK * CHUNK
    return first


@triton.jit
def _fold(top, norm, total, part_top, part_norm, part):  # type: ignore[no-untyped-def]
    """Add one softmax part to a running one. Tops are maxima of the base-2 scores, or -inf."""
    new = tl.maximum(top, part_top)
    # Both may be -inf where nothing was visible; their difference would be NaN.
    safe = tl.where(new == float("-inf"), 0.0, new)
    kept, added = tl.exp2(top - safe), tl.exp2(part_top - safe)
    total = total * kept[:, None] + part * added[:, None]
    return new, norm * kept + part_norm * added, total


@triton.jit
def _keys(  # type: ignore[no-untyped-def]
    q,
    position,
    k_ptr,
    v_ptr,
    table_ptr,
    low,
    begin,
    end,
    scale,
    slot_stride,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """The softmax part of rows q [ROWS, D] over keys begin .. end; none below low is read."""
    columns = tl.arange(0, D)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    norm = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS, D], tl.float32)
    first = _first_key(position, WINDOW, CHUNK)
    for at in range(begin, end, KEYS):
        key = at + tl.arange(0, KEYS)
        held = (key >= low) & (key < end)
        block = tl.load(table_ptr + key // PAGE, mask=held, other=0).to(tl.int64)
        slot = (block * PAGE + key % PAGE) * slot_stride
        k = tl.load(k_ptr + slot[None, :] + columns[:, None], mask=held[None, :], other=0.0)
        scores = tl.dot(q, k.to(q.dtype), input_precision="ieee") * scale
        visible = held[None, :] & (key[None, :] <= position[:, None])
        if WINDOW or CHUNK:
            visible &= key[None, :] >= first[:, None]
        scores = tl.where(visible, scores, float("-inf"))
        new = tl.maximum(top, tl.max(scores, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp2(scores - safe[:, None])
        kept = tl.exp2(top - safe)
        # What is not held may be NaN in the cache, and 0 * NaN is not 0: it is never loaded.
        v = tl.load(v_ptr + slot[:, None] + columns[None, :], mask=held[:, None], other=0.0)
        total = total * kept[:, None]
        total = tl.dot(p.to(q.dtype), v.to(q.dtype), total, input_precision="ieee")
        norm = norm * kept + tl.sum(p, 1)
        top = new
    return top, norm, total


@triton.jit(do_not_specialize=["table_stride", "splits"])
def _attend(  # type: ignore[no-untyped-def]
    q_ptr,
    k_ptr,
    v_ptr,
    sinks_ptr,
    out_ptr,
    tops_ptr,
    norms_ptr,
    tables_ptr,
    lines_ptr,
    starts_ptr,
    counts_ptr,
    firsts_ptr,
    tile_rows_ptr,
    tile_offsets_ptr,
    scale,
    table_stride,
    q_stride,
    slot_stride,
    heads,
    splits,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SPAN: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Grid (tiles, KV heads, splits). Without SPLIT the result goes to out [T, heads, D]; with it
    fp32 parts go to out [tiles, heads, splits, D] and tops, norms [tiles, heads, splits]."""
    tile, kv, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    QUERIES: tl.constexpr = ROWS // GROUP
    row = tl.load(tile_rows_ptr + tile)
    begin_query = tl.load(tile_offsets_ptr + tile)
    start, count = tl.load(starts_ptr + row), tl.load(counts_ptr + row)
    index = tl.arange(0, ROWS)
    offset = begin_query + index // GROUP
    head = kv * GROUP + index % GROUP
    real = (index < QUERIES * GROUP) & (offset < count)
    position = start + offset
    token = (tl.load(firsts_ptr + row) + offset).to(tl.int64)
    columns = tl.arange(0, D)
    q_at = token[:, None] * q_stride + head[:, None] * D + columns[None, :]
    q = tl.load(q_ptr + q_at, mask=real[:, None], other=0.0)
    low = _first_key(start + begin_query, WINDOW, CHUNK)
    stop = start + tl.minimum(begin_query + QUERIES, count)
    aligned = low // KEYS * KEYS
    k_ptr += kv * D
    v_ptr += kv * D
    table_ptr = tables_ptr + tl.load(lines_ptr + row).to(tl.int64) * table_stride
    if SPLIT:
        if SPAN:
            begin, end = tl.maximum(split * SPAN, aligned), tl.minimum((split + 1) * SPAN, stop)
        else:
            each = tl.cdiv(tl.cdiv(stop - aligned, KEYS), splits) * KEYS
            begin = aligned + split * each
            end = tl.minimum(begin + each, stop)
        top, norm, total = _keys(
            q, position, k_ptr, v_ptr, table_ptr, low, begin, end, scale, slot_stride,
            D, PAGE, WINDOW, CHUNK, ROWS, KEYS,
        )  # fmt: skip
        part = (tile.to(tl.int64) * heads + head) * splits + split
        tl.store(tops_ptr + part, top, mask=real)
        tl.store(norms_ptr + part, norm, mask=real)
        tl.store(out_ptr + part[:, None] * D + columns[None, :], total, mask=real[:, None])
    else:
        top = tl.full([ROWS], float("-inf"), tl.float32)
        norm = tl.zeros([ROWS], tl.float32)
        total = tl.zeros([ROWS, D], tl.float32)
        if sinks_ptr is not None:
            top = (
                tl.load(sinks_ptr + head, mask=real, other=0.0).to(tl.float32) * 1.4426950408889634
            )
            norm = tl.full([ROWS], 1.0, tl.float32)
        if SPAN:
            for span in range(aligned // SPAN, tl.cdiv(stop, SPAN)):
                begin = tl.maximum(span * SPAN, aligned)
                end = tl.minimum((span + 1) * SPAN, stop)
                part_top, part_norm, part = _keys(
                    q, position, k_ptr, v_ptr, table_ptr, low, begin, end, scale, slot_stride,
                    D, PAGE, WINDOW, CHUNK, ROWS, KEYS,
                )  # fmt: skip
                top, norm, total = _fold(top, norm, total, part_top, part_norm, part)
        else:
            part_top, part_norm, part = _keys(
                q, position, k_ptr, v_ptr, table_ptr, low, aligned, stop, scale, slot_stride,
                D, PAGE, WINDOW, CHUNK, ROWS, KEYS,
            )  # fmt: skip
            top, norm, total = _fold(top, norm, total, part_top, part_norm, part)
        out = total / norm[:, None]
        at = (token[:, None] * heads + head[:, None]) * D + columns[None, :]
        tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=real[:, None])


@triton.jit(do_not_specialize=["splits"])
def _combine(  # type: ignore[no-untyped-def]
    parts_ptr,
    tops_ptr,
    norms_ptr,
    sinks_ptr,
    out_ptr,
    starts_ptr,
    counts_ptr,
    firsts_ptr,
    tile_rows_ptr,
    heads,
    splits,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Grid (tiles, KV heads): adds up the parts of decoding rows in order, the sink once."""
    tile, kv = tl.program_id(0), tl.program_id(1)
    row = tl.load(tile_rows_ptr + tile)
    position = tl.load(starts_ptr + row)
    index = tl.arange(0, ROWS)
    head = kv * GROUP + index
    real = (index < GROUP) & (tl.load(counts_ptr + row) > 0)
    columns = tl.arange(0, D)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    norm = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS, D], tl.float32)
    if sinks_ptr is not None:
        top = tl.load(sinks_ptr + head, mask=real, other=0.0).to(tl.float32) * 1.4426950408889634
        norm = tl.full([ROWS], 1.0, tl.float32)
    first, last = 0, splits
    if SPAN:
        first = _first_key(position, WINDOW, CHUNK) // KEYS * KEYS // SPAN
        last = position // SPAN + 1
    for split in range(first, last):
        part = (tile.to(tl.int64) * heads + head) * splits + split
        part_top = tl.load(tops_ptr + part, mask=real, other=float("-inf"))
        part_norm = tl.load(norms_ptr + part, mask=real, other=0.0)
        at = part[:, None] * D + columns[None, :]
        values = tl.load(parts_ptr + at, mask=real[:, None], other=0.0)
        top, norm, total = _fold(top, norm, total, part_top, part_norm, values)
    out = total / norm[:, None]
    token = tl.load(firsts_ptr + row).to(tl.int64)
    at = (token * heads + head[:, None]) * D + columns[None, :]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=real[:, None])


def plan(rows: Rows, put: Put, config: Attention) -> PagedPlan:
    """Lay a step out as tiles. ``config`` is the one that ``paged_attention`` will get.

    Parts of decoding rows are powers of two, so that few graphs serve all lengths.
    """
    firsts = rows.counts.cumsum(0) - rows.counts

    def send(tensor: Tensor) -> Tensor:
        return put(tensor.to(torch.int32))

    tiles = []
    decoding = torch.nonzero(rows.counts <= 1)[:, 0]  # padding, too
    if len(decoding):
        last = rows.starts[decoding]
        seen = int((last + 1 - rows.first_key(last)).max())
        if config.span:
            splits = 1 << int(last.max() // config.span).bit_length()
        else:
            wanted = -(-config.programs // (len(decoding) * config.kv_heads))
            splits = max(1, min(wanted, seen // config.least_split))
            splits = 1 << splits.bit_length() - 1
        splits = 1 if rows.window and seen <= config.least_split else splits
        tiles.append(Tiles(send(decoding), send(decoding * 0), True, splits))
    prefilling = torch.nonzero(rows.counts > 1)[:, 0]
    if len(prefilling):
        each = config.prefill.rows // config.group
        number = (rows.counts[prefilling] + each - 1) // each
        of = torch.repeat_interleave(prefilling, number)
        nth = torch.arange(len(of)) - torch.repeat_interleave(number.cumsum(0) - number, number)
        tiles.append(Tiles(send(of), send(nth * each), False, 1))
    return PagedPlan(
        put(rows.written()),
        rows.resident,
        send(rows.lines),
        send(rows.starts),
        send(rows.counts),
        send(firsts),
        tuple(tiles),
        rows.block_size,
        rows.window,
        rows.chunk,
        config,
    )


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    plan: PagedPlan,
    sinks: Tensor | None,
    scale: float,
) -> Tensor:
    """See ``kernels.reference.paged_attention``; caches may be fp8 (e4m3)."""
    tokens, heads, size = q.shape
    assert q.stride()[1:] == (size, 1)
    assert k_cache.stride() == v_cache.stride() == (k_cache.stride(0), size, 1)
    config = plan.config
    out = torch.empty(tokens, heads * size, dtype=q.dtype, device=q.device)
    shared: dict[str, Any] = {
        "D": size,
        "GROUP": config.group,
        "WINDOW": plan.window,
        "CHUNK": plan.chunk,
        "SPAN": config.span,
        # A fused multiply-add in one program and not in another would round differently.
        "enable_fp_fusion": not config.span,
    }
    for tiles in plan.tiles:
        tile = config.decode if tiles.decode else config.prefill
        n, splits = len(tiles.rows), tiles.splits
        split = splits > 1
        part = out
        tops = norms = torch.empty(0, dtype=torch.float32, device=q.device)
        if split:
            part = torch.empty(n, heads, splits, size, dtype=torch.float32, device=q.device)
            # Two tensors, so that both are aligned whatever the step's numbers are.
            tops = torch.empty(n, heads, splits, dtype=torch.float32, device=q.device)
            norms = torch.empty_like(tops)
        launch(
            _attend,
            (n, config.kv_heads, splits),
            q,
            k_cache,
            v_cache,
            sinks,
            part,
            tops,
            norms,
            plan.tables,
            plan.lines,
            plan.starts,
            plan.counts,
            plan.firsts,
            tiles.rows,
            tiles.offsets,
            scale * LOG2_E,
            plan.tables.stride(0),
            q.stride(0),
            k_cache.stride(0),
            heads,
            splits,
            PAGE=plan.block_size,
            ROWS=tile.rows,
            KEYS=tile.columns,
            SPLIT=split,
            tile=tile,
            **shared,
        )
        if split:
            launch(
                _combine,
                (n, config.kv_heads),
                part,
                tops,
                norms,
                sinks,
                out,
                plan.starts,
                plan.counts,
                plan.firsts,
                tiles.rows,
                heads,
                splits,
                ROWS=max(16, triton.next_power_of_2(config.group)),
                KEYS=tile.columns,
                num_warps=1,
                **shared,
            )
    return out
