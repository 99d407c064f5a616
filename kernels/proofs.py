"""Sections 1 to 3 of the GPU check: kernels against references, batch invariance, graphs.

Those of kernels run on any device: tests run them under the interpreter, at small sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import nvfp4, reference, roofline
from kernels.dispatch import Ops, Shapes, choose
from kernels.int4 import Int4
from kernels.mxfp4 import MXFP4
from kernels.nvfp4 import NVFP4
from kernels.reference import Draws
from kernels.roofline import GPT_OSS_20B, Ceilings, Group, Layer, Step

# Of errors, in parts of the largest expected value or of 1.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
SIZES = (1, 17, 63, 100)


@dataclass(frozen=True, slots=True)
class Figure:
    """What a check found: a number, its unit, and the fraction of what is possible."""

    value: float
    unit: str
    fraction: float | None = None
    target: str = ""


@dataclass(frozen=True, slots=True)
class Context:
    """Where a check runs. ``figures`` are the earlier checks', by name; the large sizes are for a
    device, the small ones for the interpreter."""

    device: torch.device
    figures: dict[str, float]
    large: bool = True

    def put(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device)

    def ops(
        self,
        dtype: torch.dtype = torch.bfloat16,
        invariant: bool = False,
        heads: tuple[int, int] = (64, 8),
        size: int = 64,
    ) -> Ops:
        arch = 0
        if self.device.type == "cuda":
            major, minor = torch.cuda.get_device_capability()
            arch = 10 * major + minor
        return choose("triton", self.device, Shapes(dtype, *heads, size, invariant, arch))

    def randn(self, *sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*sizes, device=self.device).to(dtype)

    @property
    def ceilings(self) -> Ceilings:
        found = self.figures
        return Ceilings(
            max(found["ceiling: HBM copy"], found["ceiling: HBM read"]) * 1e12,
            found["ceiling: bf16 product"] * 1e12,
            found.get("ceiling: fp8 product", 0.0) * 1e12,
        )


Check = Callable[[Context], Figure | None]


class _Poison(TorchDispatchMode):
    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        if function in (torch.ops.aten.empty.memory_format, torch.ops.aten.empty_like.default):
            out.fill_(math.nan if out.is_floating_point() else -1)
        return out


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that a kernel must write holds NaN (integers: -1) before it does."""
    with _Poison():  # type: ignore[no-untyped-call]
        yield


class Errors:
    """The largest error so far, and whether all were tolerable."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.tolerance, self.largest = TOLERANCE[dtype], 0.0

    def compare(self, what: str, ours: Tensor, theirs: Tensor) -> None:
        assert ours.shape == theirs.shape, f"{what}: {tuple(ours.shape)}, not {tuple(theirs.shape)}"
        assert bool(theirs.isfinite().all()), f"{what}: the reference itself is not finite"
        difference = (ours.double() - theirs.double()).abs().max()
        error = float(difference) / max(1.0, float(theirs.abs().max()))
        # A NaN is not below anything.
        assert error <= self.tolerance, f"{what}: error {error:.3g} above {self.tolerance}"
        self.largest = max(self.largest, error)

    def figure(self) -> Figure:
        return Figure(self.largest, f"error, at most {self.tolerance:g}")


def equal(what: str, ours: Tensor, theirs: Tensor) -> None:
    """To the bit, NaN to none."""
    assert torch.equal(ours, theirs), (
        f"{what}: {int((ours != theirs).sum())} of {ours.numel()} values differ"
    )


# Section 1: every kernel against its reference.


def norms(c: Context, dtype: torch.dtype) -> Figure:
    ops, errors = c.ops(dtype), Errors(dtype)
    for tokens, width in zip(SIZES, (17, 63, 100, 2880 if c.large else 720), strict=True):
        x, residual = c.randn(2, tokens, width, dtype=dtype).mul(3)
        weight = torch.rand(width, device=c.device).to(dtype)
        with poisoned():
            alone = ops.rms_norm(x, weight, 1e-5)
            normed, total = ops.add_rms_norm(x, residual, weight, 1e-5)
        wide = weight.float()
        errors.compare("rms_norm", alone, reference.rms_norm(x.float(), wide, 1e-5))
        equal("the sum", total, x + residual)
        errors.compare("add_rms_norm", normed, reference.rms_norm(total.float(), wide, 1e-5))
    return errors.figure()


def invariant_linear(c: Context, dtype: torch.dtype) -> Figure:
    ops, errors = c.ops(dtype, invariant=True), Errors(dtype)
    for tokens, rows, depth in ((1, 17, 63), (17, 100, 100), (63, 128, 2880 if c.large else 80)):
        x, w = c.randn(tokens, depth, dtype=dtype), c.randn(rows, depth, dtype=dtype)
        bias = c.randn(rows, dtype=dtype)
        with poisoned():
            ours = ops.linear(x, w, bias)
        errors.compare(f"{rows} x {depth}", ours, x.float() @ w.float().T + bias.float())
    return errors.figure()


def rope_kv_write(c: Context, dtype: torch.dtype, fp8: bool = False) -> Figure:
    """Keys beyond e4m3's range, and a padding token, which must leave no trace."""
    ops, errors = c.ops(dtype), Errors(dtype)
    kept = torch.float8_e4m3fn if fp8 else dtype
    for tokens, heads, kv_heads in ((1, 8, 1), (17, 10, 2), (63, 64, 8)):
        size, slots = 64, 2 * tokens + 1
        qkv = c.randn(tokens, heads + 2 * kv_heads, size, dtype=dtype)
        if fp8:
            qkv[0, -1, 0] = 1000.0
        q, k, v = qkv.split((heads, kv_heads, kv_heads), 1)
        cos, sin = c.randn(2, tokens, 1, size, dtype=dtype)
        where = torch.randperm(slots - 1, device=c.device)[:tokens]
        memory = torch.zeros(2, slots, kv_heads, size, device=c.device).to(kept)
        caches = memory[:, 1:]  # slot -1 would be what lies before
        expected = torch.zeros(2, slots - 1, kv_heads, size, device=c.device)
        wide = [t.float() for t in (q, k, v, cos, sin)]
        rotated = reference.rope_kv_write(
            wide[0], wide[1], wide[2], wide[3], wide[4], expected[0], expected[1], where
        )
        if tokens > 1:
            expected[:, where[1]] = 0
            where[1] = -1
        if fp8:
            expected = expected.clamp(-448, 448)
        with poisoned():
            ours = ops.rope_kv_write(q, k, v, cos, sin, caches[0], caches[1], where)
        errors.compare("queries", ours, rotated)
        assert not memory[:, 0].float().any(), "padding was stored"
        held = caches.float()
        if fp8:  # three bits of mantissa
            torch.testing.assert_close(held, expected, atol=2**-9, rtol=2**-4)
        else:
            errors.compare("caches", held, expected)
    return errors.figure()


class Scene:
    """Rows (start, count) of a step over a cache where all that must not be read is NaN."""

    def __init__(
        self,
        c: Context,
        rows: Sequence[tuple[int, int]],
        *,
        dtype: torch.dtype = torch.bfloat16,
        heads: tuple[int, int] = (64, 8),
        size: int = 64,
        window: int = 0,
        chunk: int = 0,
        fp8: bool = False,
    ) -> None:
        self.rows, blocks = roofline.paged_rows(rows, window, c.put, chunk)
        shape = (2, blocks * roofline.PAGE, heads[1], size)
        cache = torch.full(shape, math.nan, device=c.device)
        cache[:, -roofline.PAGE :] = 0
        for row, (start, count) in enumerate(rows):
            low = int(self.rows.first_key(torch.tensor(start)))
            slots = c.put(self.rows.slots(row, torch.arange(low, start + count)))
            cache[:, slots] = c.randn(2, len(slots), heads[1], size)
        self.cache = cache.to(torch.float8_e4m3fn if fp8 else dtype)
        self.q = c.randn(self.rows.tokens, heads[0], size, dtype=dtype)
        self.sinks, self.scale = c.randn(heads[0], dtype=dtype), size**-0.5
        self.put = c.put

    def attend(self, ops: Ops) -> Tensor:
        plan = ops.plan(self.rows, self.put)
        with poisoned():
            k, v = self.cache
            return ops.paged_attention(self.q, k, v, plan, self.sinks, self.scale)

    def expected(self) -> Tensor:
        plan = reference.plan(self.rows, self.put)
        wide = self.cache.float()
        return reference.paged_attention(
            self.q.float(), wide[0], wide[1], plan, self.sinks.float(), self.scale
        )


DECODE = ((0, 1), (16, 1), (62, 1), (99, 1))
MIXED = ((0, 17), (99, 1), (37, 63), (0, 1), (5, 2))


def attention(c: Context, rows: Sequence[tuple[int, int]], **how: Any) -> Figure:
    dtype = how.get("dtype", torch.bfloat16)
    heads, size = how.get("heads", (64, 8)), how.get("size", 64)
    scene, errors = Scene(c, rows, **how), Errors(dtype)
    errors.compare("attention", scene.attend(c.ops(dtype, False, heads, size)), scene.expected())
    return errors.figure()


def route(c: Context, experts: int, k: int) -> Figure:
    ops, errors = c.ops(), Errors(torch.float32)
    for tokens in SIZES:
        # All different, and exact in bf16.
        logits = torch.stack([torch.randperm(experts, device=c.device) for _ in range(tokens)])
        logits = (logits / 16).bfloat16()
        slots = torch.arange(tokens, device=c.device) - 1  # the first is padding
        with poisoned():
            ids, weights = ops.route(logits, k, slots)
        expected_ids, expected = reference.route(logits, k, slots)
        equal("ids", ids.long(), expected_ids)
        if tokens > 1:
            errors.compare("weights", weights[1:], expected[1:])
    return errors.figure()


def random_weights(
    c: Context, form: str, experts: int, rows: int, depth: int
) -> MXFP4 | NVFP4 | Int4:
    """Matrices [experts, rows, depth] of small numbers."""
    shape = experts, rows, depth
    if form == "MXFP4":
        return roofline.random_mxfp4(*shape, c.device)
    numbers = c.randn(*shape) * shape[-1] ** -0.5
    if form == "NVFP4":
        return nvfp4.quantize(numbers, numbers.abs().amax((1, 2)) / nvfp4.LARGEST)
    words = torch.randint(-(2**31), 2**31, (*shape[:-1], shape[-1] // 8), device=c.device)
    scales = torch.rand(*shape[:-1], shape[-1] // 128, device=c.device) * 0.2 * shape[-1] ** -0.5
    return Int4(words.int(), scales.bfloat16())


def _exact(x: Tensor) -> Tensor:
    return x


ROUNDED = {"mxfp4 x mxfp8": reference.as_mxfp8, "nvfp4 x nvfp4": reference.as_nvfp4}


def experts(c: Context, dtype: torch.dtype, form: str, routing: str) -> Figure:
    """``spread`` leaves experts without tokens; ``one`` sends all to one; ``ranks`` has experts 2
    and on here, the others elsewhere, and pads."""
    ops, errors = c.ops(dtype), Errors(dtype)
    k, count, hidden, inner = 4, *((32, 2880, 2880) if c.large else (6, 96, 64))
    w13: reference.Weights
    w2: reference.Weights
    if form == "INT4":
        count, hidden, inner = (16, 5120, 1024) if c.large else (6, 256, 128)
    if form == "dense":
        count, hidden, inner = (16, 2880, 200) if c.large else (6, 100, 50)
        w13 = c.randn(count, 2 * inner, hidden, dtype=dtype) * hidden**-0.5
        w2 = c.randn(count, hidden, inner, dtype=dtype) * inner**-0.5
    else:
        w13 = random_weights(c, form, count, 2 * inner, hidden)
        w2 = random_weights(c, form, count, hidden, inner)
    b13, b2 = c.randn(count, 2 * inner, dtype=dtype), c.randn(count, hidden, dtype=dtype)
    packed = ops.pack(w13), ops.pack(w2)
    # Tensor cores that take scales want them of activations, too: rounded from the same ones.
    rounding = ROUNDED.get(getattr(packed[0], "form", ""), _exact)
    kept = torch.float32 if rounding is _exact and form != "INT4" else dtype
    wide = [w.to(kept) if isinstance(w, Tensor) else w for w in (w13, w2)]
    for tokens in (*SIZES, 1000) if c.large else (1, 17):
        x, logits = c.randn(tokens, hidden, dtype=dtype), c.randn(tokens, count)
        if routing == "spread":
            logits[:, ::3] -= 100 if 2 * count // 3 >= k else 0
        if routing == "one":
            logits[:, 1] += 100
        ids, weights = reference.route(logits, k, torch.arange(tokens, device=c.device))
        first, bias = 0, b2 if routing != "ranks" else None
        if routing == "ranks":
            first = 2
            ids[0] = -1
        ids = ids.int()
        with poisoned():
            ours = ops.experts(x, ids, weights, packed[0], b13, packed[1], bias, first, 7.0, 1.702)
        theirs = reference.experts(
            x.to(kept), ids, weights, wide[0], b13.to(kept), wide[1],
            None if bias is None else bias.to(kept), first, 7.0, 1.702, False, rounding,
        )  # fmt: skip
        errors.compare(f"{tokens} tokens", ours, theirs)
    return errors.figure()


def sampling(c: Context, filters: tuple[int, float, float]) -> None:
    """Greedy and drawn rows; a token may differ from the reference's where both score alike."""
    ops, rows, vocab = c.ops(), *((64, 201_088) if c.large else (4, 1100))
    logits = c.randn(rows, vocab, dtype=torch.bfloat16) * 3
    temperature = torch.rand(rows, device=c.device) + 0.2
    temperature[::4] = 0
    k, p, least = filters
    keys = torch.randint(-(2**31), 2**31, (rows, 2), device=c.device).int()
    draws = Draws(
        temperature,
        torch.full((rows,), k, dtype=torch.int32, device=c.device),
        torch.full((rows,), p, device=c.device),
        torch.full((rows,), least, device=c.device),
        keys,
        None,
        True,
        filters != (0, 1.0, 0.0),
    )
    with poisoned():
        ours = ops.sample(logits, draws)
    theirs = reference.sample(logits, draws)
    scores = logits.float() / temperature.clamp(min=1e-9)[:, None] + reference.gumbel(keys, vocab)
    scores = torch.where(temperature[:, None] > 0, scores, logits.float())
    a, b = (scores.gather(1, tokens[:, None]) for tokens in (ours, theirs))
    assert bool(((ours == theirs) | ((a - b).abs() < 1e-4)[:, 0]).all()), "other tokens"


def penalties(c: Context) -> Figure:
    ops, errors = c.ops(), Errors(torch.float32)
    rows, vocab = (64, 201_088) if c.large else (3, 1500)
    logits = c.randn(rows, vocab, dtype=torch.bfloat16)
    counts = torch.randint(0, 3, (rows + 2, vocab), device=c.device).int()
    counts += torch.randint(0, 2, (rows + 2, vocab), device=c.device).int() * reference.PROMPT
    lines = torch.randperm(rows + 2, device=c.device)[:rows]
    rest = (torch.rand(rows, device=c.device) + 0.5, *c.randn(2, rows))
    with poisoned():
        ours = ops.penalise(logits, counts, lines, *rest)
    errors.compare("logits", ours, reference.penalise(logits, counts, lines, *rest))
    return errors.figure()


# Section 2: a row's result does not depend on its batch.


def invariant_attention(c: Context, window: int) -> None:
    """The last rows of a sequence: prefilled at once, chunked, decoded alone, and among 64."""
    heads, size = ((64, 8), 64) if c.large else ((4, 2), 16)
    length, others = (1500, 63) if c.large else (70, 3)
    ops = c.ops(torch.bfloat16, True, heads, size)
    whole = Scene(c, [(0, length)], heads=heads, size=size)
    keys = whole.cache[:, c.put(whole.rows.slots(0, torch.arange(length)))]
    whole.rows = replace(whole.rows, window=window)
    expected = whole.attend(ops)

    def part(start: int, count: int, beside: list[tuple[int, int]]) -> Tensor:
        scene = Scene(c, [(start, count), *beside], heads=heads, size=size, window=window)
        low = max(0, start - window + 1) if window else 0
        held = torch.arange(low, start + count)
        scene.cache[:, c.put(scene.rows.slots(0, held))] = keys[:, low : start + count]
        scene.q[:count], scene.sinks = whole.q[start : start + count], whole.sinks
        return scene.attend(ops)[:count]

    batch = [(17 * i % length, 1 if i % 3 else 5) for i in range(others)]
    for what, start, count, beside in (
        ("decoded alone", length - 1, 1, []),
        ("decoded in a batch", length - 1, 1, batch),
        ("a chunk", length // 3, 17, []),
        ("a chunk in a batch", length // 3, 40, batch),
        ("the last chunk", length - 33, 33, []),
    ):
        equal(what, part(start, count, beside), expected[start : start + count])


def invariant_products(c: Context, mxfp4: bool) -> None:
    ops = c.ops(invariant=True)
    count, hidden, inner = (32, 2880, 2880) if c.large else (6, 96, 32)
    x, logits = c.randn(64, hidden, dtype=torch.bfloat16), c.randn(64, count)
    if mxfp4:
        w13, w2 = (
            roofline.random_mxfp4(count, *sizes, c.device)
            for sizes in ((2 * inner, hidden), (hidden, inner))
        )
        packed = ops.pack(w13), ops.pack(w2)
    else:
        packed = (
            ops.pack(c.randn(count, 2 * inner, hidden, dtype=torch.bfloat16)),
            ops.pack(c.randn(count, hidden, inner, dtype=torch.bfloat16)),
        )
    b13 = c.randn(count, 2 * inner, dtype=torch.bfloat16)
    b2, weight = c.randn(count, hidden, dtype=torch.bfloat16), c.randn(hidden)
    matrix = c.randn(100, hidden, dtype=torch.bfloat16)

    def run(rows: slice) -> tuple[Tensor, ...]:
        mine = x[rows].contiguous()
        slots = torch.arange(len(mine), device=c.device)
        ids, weights = ops.route(logits[rows].contiguous(), 4, slots)
        out = ops.experts(mine, ids, weights, packed[0], b13, packed[1], b2, 0, 7.0, 1.702)
        return out, ops.linear(mine, matrix, None), ops.rms_norm(mine, weight, 1e-5)

    expected = run(slice(0, 64))
    for rows in (slice(0, 1), slice(63, 64), slice(3, 20)):
        for what, ours, theirs in zip(
            ("experts", "linear", "norm"), run(rows), expected, strict=True
        ):
            equal(f"{what}, rows {rows.start} to {rows.stop}", ours, theirs[rows])


# Section 3: graphs. A device from here on.


def two_layers(c: Context, batch: int = 8) -> Step:
    """One with a window, one without."""
    ops, shape = c.ops(), GPT_OSS_20B
    rows = [(1000 + i, 1) for i in range(batch)]
    groups = Group.of(ops, rows, shape.window, c.put), Group.of(ops, rows, 0, c.put)
    return Step(ops, shape, [Layer.random(ops, shape, c.device) for _ in range(2)], groups, batch)


def graph_equals_eager(c: Context) -> None:
    step = two_layers(c)
    step.decode()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step.decode()
    for _ in range(3):
        step.x.copy_(torch.randn_like(step.x))
        step.logits[0].copy_(torch.randn_like(step.logits[0]))
        graph.replay()
        replayed = out.clone()
        equal("replayed and eager", replayed, step.decode())


def nccl_in_a_graph(c: Context) -> None:
    import torch.distributed as dist

    store = dist.HashStore()
    dist.init_process_group(
        "nccl", store=store, rank=0, world_size=1, device_id=torch.device("cuda", 0)
    )
    try:
        x = torch.randn(64, 2880, device=c.device)
        dist.all_reduce(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # NCCL's watchdog thread may ask for events meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            y = x * 2
            dist.all_reduce(y)
            y += 1
        x.copy_(torch.randn_like(x))
        graph.replay()
        equal("all_reduce of one rank", y, x * 2 + 1)
    finally:
        torch.cuda.synchronize()
        dist.destroy_process_group()


def graph_checks() -> list[tuple[str, Check]]:
    """Section 3."""
    return [
        ("graph: two layers of a decode step, on and off", graph_equals_eager),
        ("graph: NCCL, world of one", nccl_in_a_graph),
    ]


def kernel_checks(*dtypes: torch.dtype) -> list[tuple[str, Check]]:
    """Section 1."""
    found: list[tuple[str, Check]] = []
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        found += [
            (f"kernel: norms, {name}", partial(norms, dtype=dtype)),
            (f"kernel: batch-invariant linear, {name}", partial(invariant_linear, dtype=dtype)),
            (f"kernel: RoPE and KV write, {name}", partial(rope_kv_write, dtype=dtype)),
            (f"kernel: attention, mixed, {name}", partial(attention, rows=MIXED, dtype=dtype)),
            (f"kernel: attention, window, {name}",
             partial(attention, rows=MIXED, dtype=dtype, window=33)),
            (f"kernel: experts, dense, {name}",
             partial(experts, dtype=dtype, form="dense", routing="spread")),
        ]  # fmt: skip
        if dtype != torch.float16:
            found += [
                (f"kernel: experts, MXFP4, {name}, {how}",
                 partial(experts, dtype=dtype, form="MXFP4", routing=how))
                for how in ("spread", "one", "ranks")
            ]  # fmt: skip
    bf16 = dtypes[0]
    long = ((0, 1), (2879, 1), (700, 1))
    return [
        *found,
        *((f"kernel: experts, {form}", partial(experts, dtype=bf16, form=form, routing="spread"))
          for form in ("NVFP4", "INT4")),
        ("kernel: RoPE and KV write, fp8", partial(rope_kv_write, dtype=bf16, fp8=True)),
        ("kernel: attention, decode", partial(attention, rows=DECODE)),
        ("kernel: attention, split decode", partial(attention, rows=long)),
        ("kernel: attention, decode, window 128", partial(attention, rows=long, window=128)),
        ("kernel: attention, window 1", partial(attention, rows=MIXED, window=1)),
        ("kernel: attention, chunk 64", partial(attention, rows=MIXED, chunk=64)),
        ("kernel: attention, fp8 KV", partial(attention, rows=MIXED, fp8=True)),
        ("kernel: attention, fp8 KV, split", partial(attention, rows=long, fp8=True)),
        ("kernel: attention, 40/8 heads of 128",
         partial(attention, rows=MIXED, heads=(40, 8), size=128)),
        ("kernel: attention, 8/8 heads", partial(attention, rows=MIXED, heads=(8, 8))),
        ("kernel: sampling", partial(sampling, filters=(0, 1.0, 0.0))),
        ("kernel: sampling, top-k 50, top-p 0.9, min-p", partial(sampling, filters=(50, 0.9, 0.1))),
        ("kernel: penalties", penalties),
        *((f"kernel: route, {k} of {n}", partial(route, experts=n, k=k))
          for n, k in ((32, 4), (128, 4), (16, 1))),
    ]  # fmt: skip


def invariance_checks() -> list[tuple[str, Check]]:
    """Section 2."""
    return [
        ("invariant: attention", partial(invariant_attention, window=0)),
        ("invariant: attention, window 128", partial(invariant_attention, window=128)),
        ("invariant: experts (MXFP4), linear, norm", partial(invariant_products, mxfp4=True)),
        ("invariant: experts (bf16), linear, norm", partial(invariant_products, mxfp4=False)),
    ]
