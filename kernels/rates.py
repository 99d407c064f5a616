"""Sections 0, 4 and 5 of the GPU check: ceilings, the time of every kernel, and of a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial

import torch
from torch import Tensor

from kernels import roofline
from kernels.dispatch import Ops
from kernels.proofs import Check, Context, Figure
from kernels.reference import Draws
from kernels.roofline import GPT_OSS_20B, GPT_OSS_120B, Cost, Group, Layer, Moe, Step


def copy_ceiling(c: Context) -> Figure:
    a = torch.ones(1 << 31, dtype=torch.uint8, device=c.device)
    b = torch.empty_like(a)
    return Figure(2 * a.nbytes / roofline.measure(lambda: b.copy_(a)) / 1e12, "TB/s")


def read_ceiling(c: Context) -> Figure:
    a = torch.ones(1 << 30, dtype=torch.bfloat16, device=c.device)
    return Figure(a.nbytes / roofline.measure(a.sum) / 1e12, "TB/s")


def bf16_ceiling(c: Context) -> Figure:
    a, b = c.randn(2, 8192, 8192, dtype=torch.bfloat16)
    return Figure(2 * 8192**3 / roofline.measure(lambda: a @ b) / 1e12, "TFLOP/s")


def fp8_ceiling(c: Context) -> Figure:
    a, b = c.randn(2, 8192, 8192, dtype=torch.float8_e4m3fn)
    one = torch.ones((), device=c.device)
    seconds = roofline.measure(
        lambda: torch._scaled_mm(a, b.T, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)
    )
    return Figure(2 * 8192**3 / seconds / 1e12, "TFLOP/s")


def timed(c: Context, run: Callable[[], object], cost: Cost, target: str = "") -> Figure:
    seconds = roofline.measure(run)
    rates = f"us, {cost.bytes / seconds / 1e12:.2f} TB/s, {cost.flops / seconds / 1e12:.0f} TFLOP/s"
    return Figure(1e6 * seconds, rates, cost.seconds(c.ceilings) / seconds, target)


def time_attention(
    c: Context,
    rows: Sequence[tuple[int, int]],
    window: int,
    invariant: bool = False,
    target: str = "",
    dtype: torch.dtype = torch.bfloat16,
) -> Figure:
    ops, shape = c.ops(invariant=invariant), GPT_OSS_120B
    group = Group.of(ops, rows, window, c.put)
    k, v = group.caches(shape, c.device, dtype)
    q = c.randn(sum(n for _, n in rows), shape.heads, shape.size, dtype=torch.bfloat16)
    sinks = c.randn(shape.heads, dtype=torch.bfloat16)
    cost = roofline.attention_cost(shape, rows, window, dtype.itemsize)
    return timed(
        c, lambda: ops.paged_attention(q, k, v, group.plan, sinks, shape.size**-0.5), cost, target
    )


@cache
def _large_moe(device: torch.device, ops: Ops) -> Moe:
    return Moe.random(ops, GPT_OSS_120B, device)


@cache
def _ops(device: torch.device, invariant: bool) -> Ops:
    return Context(device, {}).ops(invariant=invariant)


def time_moe(c: Context, tokens: int, target: str = "", invariant: bool = False) -> Figure:
    shape, ops = GPT_OSS_120B, _ops(c.device, invariant)
    moe = replace(_large_moe(c.device, _ops(c.device, False)), ops=ops)
    x = c.randn(tokens, shape.hidden, dtype=torch.bfloat16)
    logits, slots = c.randn(tokens, shape.experts), torch.arange(tokens, device=c.device)
    ids, weights = ops.route(logits, shape.k, slots)
    cost = roofline.moe_cost(shape, tokens, moe.eight_bit)
    return timed(c, lambda: moe(x, ids, weights), cost, target)


def time_linear(c: Context, rows: int, depth: int, tokens: int, invariant: bool = False) -> Figure:
    ops = c.ops(invariant=invariant)
    x, w = (c.randn(n, depth, dtype=torch.bfloat16) for n in (tokens, rows))
    cost = roofline.dense_cost(rows * depth, tokens)
    return timed(c, lambda: ops.linear(x, w, None), cost)


def unfiltered(c: Context, rows: int) -> Draws:
    """At temperature 1, as gpt-oss is to be sampled."""
    one, none = torch.ones(rows, device=c.device), torch.zeros(rows, device=c.device)
    keys = torch.randint(-(2**31), 2**31, (rows, 2), device=c.device).int()
    return Draws(one, none.int(), one, none, keys, None, True, False)


def time_sampling(c: Context, rows: int) -> Figure:
    ops, logits = c.ops(), c.randn(rows, GPT_OSS_120B.vocabulary, dtype=torch.bfloat16)
    draws = unfiltered(c, rows)
    return timed(c, lambda: ops.sample(logits, draws), Cost(float(logits.nbytes), 0.0))


def time_norm(c: Context, tokens: int) -> Figure:
    ops = c.ops()
    x, residual = c.randn(2, tokens, 2880, dtype=torch.bfloat16)
    cost = Cost(4.0 * x.nbytes, 0.0)
    return timed(c, lambda: ops.add_rms_norm(x, residual, x[0], 1e-5), cost)


# Section 5: a whole step.


@cache
def _layers(device: torch.device) -> list[Layer]:
    """gpt-oss-20b's, 12 GB."""
    ops = _ops(device, False)
    return [Layer.random(ops, GPT_OSS_20B, device) for _ in range(GPT_OSS_20B.layers)]


def time_step(c: Context, batch: int, target: str = "", invariant: bool = False) -> Figure:
    shape, context = GPT_OSS_20B, 1500
    ops = _ops(c.device, invariant)
    rows = [(context - 1, 1)] * batch
    groups = Group.of(ops, rows, shape.window, c.put), Group.of(ops, rows, 0, c.put)
    layers = [replace(each, moe=replace(each.moe, ops=ops)) for each in _layers(c.device)]
    step = Step(ops, shape, layers, groups, batch)
    head = c.randn(shape.vocabulary, shape.hidden, dtype=torch.bfloat16)
    norm, draws = layers[0].norm, unfiltered(c, batch)

    def decode() -> Tensor:
        logits = ops.linear(ops.rms_norm(step.decode(), norm, 1e-5), head, None)
        return ops.sample(logits, draws)

    seconds = roofline.measure(decode, flush=False)
    eight_bit = layers[0].moe.eight_bit
    least = roofline.step_seconds(shape, batch, context, c.ceilings, eight_bit)
    return Figure(1e3 * seconds, f"ms, {batch / seconds:.0f} tokens/s", least / seconds, target)


Named = list[tuple[str, Check]]


def ceilings() -> Named:
    """Section 0."""
    found: Named = [
        ("ceiling: HBM copy", copy_ceiling),
        ("ceiling: HBM read", read_ceiling),
        ("ceiling: bf16 product", bf16_ceiling),
    ]
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9):
        found.append(("ceiling: fp8 product", fp8_ceiling))
    return found


def invariance_costs() -> Named:
    """The last of section 2; the same with the fast kernels is in section 4."""
    rows = [(8191, 1)] * 64
    return [
        (
            "time, batch-invariant: decode attention, 64 x 8k",
            partial(time_attention, rows=rows, window=0, invariant=True),
        ),
        (
            "time, batch-invariant: MoE 120b, 64 tokens",
            partial(time_moe, tokens=64, invariant=True),
        ),
        (
            "time, batch-invariant: linear qkv, 64 tokens",
            partial(time_linear, rows=5120, depth=2880, tokens=64, invariant=True),
        ),
    ]


def kernel_times() -> Named:
    """Section 4."""
    found: Named = []
    for batch in (1, 8, 64):
        for window in (0, 128):
            name = f"time: decode attention, {batch} x 8k" + (", window 128" if window else "")
            target = "88 %" if batch == 64 and not window else ""
            check = partial(time_attention, rows=[(8191, 1)] * batch, window=window, target=target)
            found.append((name, check))
    for start, count in ((0, 8192), (6144, 2048)):
        for window in (0, 128):
            name = f"time: prefill attention, {count} after {start}"
            name += ", window 128" if window else ""
            found.append((name, partial(time_attention, rows=[(start, count)], window=window)))
    for tokens in (1, 8, 64, 256, 512, 4096):
        target = "57 % on H100, 50 % on B200" if tokens == 4096 else "75 %" if tokens >= 64 else ""
        check = partial(time_moe, tokens=tokens, target=target)
        found.append((f"time: MoE 120b, {tokens} tokens", check))
    for name, rows, depth in (
        ("qkv", 5120, 2880),
        ("o", 2880, 4096),
        ("router", 128, 2880),
        ("head", 201_088, 2880),
    ):
        for tokens in (1, 64, 256):
            check = partial(time_linear, rows=rows, depth=depth, tokens=tokens)
            found.append((f"time: linear {name}, {tokens} tokens", check))
    fp8 = partial(time_attention, rows=[(8191, 1)] * 64, window=0, dtype=torch.float8_e4m3fn)
    return [
        *found,
        ("time: decode attention, 64 x 8k, fp8", fp8),
        ("time: sampling, 64 rows", partial(time_sampling, rows=64)),
        ("time: add and norm, 64 tokens", partial(time_norm, tokens=64)),
    ]


def steps() -> Named:
    """Section 5."""
    return [
        *(
            (f"step: gpt-oss-20b decode, batch {batch}", partial(time_step, batch=batch, target=to))
            for batch, to in ((1, "40 %"), (8, ""), (64, "65 %"), (256, "65 %"))
        ),
        ("step, batch-invariant: batch 64", partial(time_step, batch=64, invariant=True)),
    ]
