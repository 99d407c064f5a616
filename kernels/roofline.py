"""What the kernels of gpt-oss cost at least, and the sequences of them that the GPU check times.

Bytes and operations by class: experts touched, dense layers, keys and values; a step takes at least
the sum of max(bytes / bandwidth, operations / peak) over the classes. Activations are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from kernels.dispatch import Ops, Plan
from kernels.mxfp4 import BLOCK, MXFP4
from kernels.reference import Put, Rows

PAGE = 16  # tokens of a KV block
REPLAYS = 20
FLUSH = 256 << 20  # bytes, several times any L2 cache


@dataclass(frozen=True, slots=True)
class Shape:
    """A gpt-oss model; its layers alternate between a window and full attention."""

    layers: int
    experts: int
    hidden: int = 2880
    inner: int = 2880
    heads: int = 64
    kv_heads: int = 8
    size: int = 64
    k: int = 4
    vocabulary: int = 201_088
    window: int = 128

    @property
    def expert_bytes(self) -> float:
        """Of one expert in MXFP4: 4.25 bits a weight."""
        return 3 * self.hidden * self.inner * 4.25 / 8

    @property
    def dense(self) -> int:
        """Weights of a layer's attention and router."""
        queries, both = self.heads * self.size, (self.heads + 2 * self.kv_heads) * self.size
        return self.hidden * (both + queries + self.experts)


GPT_OSS_20B = Shape(24, 32)
GPT_OSS_120B = Shape(36, 128)


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Of a device, as measured."""

    bandwidth: float  # bytes/s
    flops: float  # bf16 operations/s
    fp8: float = 0.0  # 8-bit operations/s; 0 where there are none


@dataclass(frozen=True, slots=True)
class Cost:
    """The least that a kernel moves and computes."""

    bytes: float
    flops: float
    eight_bit: bool = False  # of the operands, so that they are faster

    def seconds(self, ceilings: Ceilings) -> float:
        peak = ceilings.fp8 if self.eight_bit and ceilings.fp8 else ceilings.flops
        return max(self.bytes / ceilings.bandwidth, self.flops / peak)


def touched(tokens: int, experts: int, k: int) -> float:
    """Experts that some token chooses, where all are chosen equally often."""
    return float(experts * (1 - (1 - k / experts) ** tokens))


def moe_cost(shape: Shape, tokens: int, eight_bit: bool = False) -> Cost:
    """One layer's experts."""
    matrices = 3 * shape.hidden * shape.inner
    hit = touched(tokens, shape.experts, shape.k)
    return Cost(hit * shape.expert_bytes, 2.0 * matrices * shape.k * tokens, eight_bit)


def dense_cost(weights: int, tokens: int) -> Cost:
    """A bf16 product with so many weights."""
    return Cost(2.0 * weights, 2.0 * weights * tokens)


def attention_cost(
    shape: Shape, rows: Sequence[tuple[int, int]], window: int, itemsize: int = 2
) -> Cost:
    """One layer's attention for rows of (start, count); ``itemsize`` is that of its keys."""
    keys = visible = 0
    for start, count in rows:
        end = start + count
        keys += end - (max(0, start - window + 1) if window else 0)
        full = sum(range(start + 1, end + 1))
        visible += sum(min(p, window) for p in range(start + 1, end + 1)) if window else full
    size = 2.0 * shape.size  # of a key and a value
    return Cost(size * keys * shape.kv_heads * itemsize, 2 * size * visible * shape.heads)


def step_seconds(
    shape: Shape, batch: int, context: int, ceilings: Ceilings, eight_bit: bool = False
) -> float:
    """The least time of a decode step."""
    rows = [(context - 1, 1)] * batch
    head = shape.hidden * shape.vocabulary
    moe = shape.layers * moe_cost(shape, batch, eight_bit).seconds(ceilings)
    dense = dense_cost(shape.layers * shape.dense + head, batch).seconds(ceilings)
    full, windowed = (attention_cost(shape, rows, window) for window in (0, shape.window))
    both = Cost(full.bytes + windowed.bytes, full.flops + windowed.flops)
    return moe + dense + shape.layers / 2 * both.seconds(ceilings)


def random_mxfp4(experts: int, rows: int, depth: int, device: torch.device) -> MXFP4:
    """Matrices [experts, rows, depth] of small numbers."""
    shape = (experts, rows, -(-depth // BLOCK))
    return MXFP4(
        torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, device=device),
        torch.randint(118, 123, shape, dtype=torch.uint8, device=device),
    )


def _normal(device: torch.device, *sizes: int) -> Tensor:
    return torch.randn(*sizes, dtype=torch.bfloat16, device=device)


@dataclass(frozen=True, slots=True)
class Moe:
    """One layer's experts, packed: w13 [E, 2 I, D], w2 [E, D, I]."""

    ops: Ops
    shape: Shape
    w13: Any
    b13: Tensor
    w2: Any
    b2: Tensor

    @classmethod
    def random(cls, ops: Ops, shape: Shape, device: torch.device) -> Moe:
        count, hidden, inner = shape.experts, shape.hidden, shape.inner
        return cls(
            ops,
            shape,
            ops.pack(random_mxfp4(count, 2 * inner, hidden, device)),
            _normal(device, count, 2 * inner),
            ops.pack(random_mxfp4(count, hidden, inner, device)),
            _normal(device, count, hidden),
        )

    @property
    def eight_bit(self) -> bool:
        """Whether tensor cores multiply packed weights with 8-bit activations."""
        return getattr(self.w13, "form", "") == "mxfp4 x mxfp8"

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        rest = (0, 7.0, 1.702)
        return self.ops.experts(x, ids, weights, self.w13, self.b13, self.w2, self.b2, *rest)


@dataclass(frozen=True, slots=True)
class Layer:
    norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor
    sinks: Tensor
    o: Tensor
    o_bias: Tensor
    router: Tensor
    moe: Moe

    @classmethod
    def random(cls, ops: Ops, shape: Shape, device: torch.device) -> Layer:
        def normal(*sizes: int) -> Tensor:
            return _normal(device, *sizes).mul_(0.02)

        queries = shape.heads * shape.size
        both = queries + 2 * shape.kv_heads * shape.size
        return cls(
            normal(shape.hidden) + 1,
            normal(both, shape.hidden),
            normal(both),
            normal(shape.heads),
            normal(shape.hidden, queries),
            normal(shape.hidden),
            normal(shape.experts, shape.hidden),
            Moe.random(ops, shape, device),
        )


def paged_rows(
    rows: Sequence[tuple[int, int]], window: int, put: Put, chunk: int = 0
) -> tuple[Rows, int]:
    """Rows of (start, count) over shuffled blocks, and the blocks of a cache that holds them.

    Only blocks that some token sees belong to a row; the other entries of its table lead to a
    block that nobody owns, the one before the last; the last is the one of zeros.
    """
    owned = []
    for start, count in rows:
        low = max(0, start - window + 1) if window else start - start % chunk if chunk else 0
        owned.append(range(low // PAGE, (start + count - 1) // PAGE + 1))
    total = sum(len(each) for each in owned)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    tables = torch.full((len(rows), max(each.stop for each in owned)), total, dtype=torch.int32)
    at = 0
    for table, each in zip(tables, owned, strict=True):
        table[each.start : each.stop] = order[at : at + len(each)]
        at += len(each)
    starts, counts = torch.tensor(rows, dtype=torch.int64).unbind(1)
    lines, tokens = torch.arange(len(rows)), int(counts.sum())
    return Rows(
        starts, counts, lines, tables, put(tables), tokens, PAGE, total + 1, window, chunk
    ), total + 2


@dataclass(frozen=True, slots=True)
class Group:
    """The KV layout of a step's layers of one kind."""

    plan: Plan
    blocks: int

    @classmethod
    def of(cls, ops: Ops, rows: Sequence[tuple[int, int]], window: int, put: Put) -> Group:
        paged, blocks = paged_rows(rows, window, put)
        return cls(ops.plan(paged, put), blocks)

    def caches(
        self, shape: Shape, device: torch.device, dtype: torch.dtype = torch.bfloat16
    ) -> tuple[Tensor, Tensor]:
        sizes = (self.blocks * PAGE, shape.kv_heads, shape.size)
        return _normal(device, *sizes).to(dtype), _normal(device, *sizes).to(dtype)


class Step:
    """The kernels of one step over static inputs, with nothing of a batch decided by values.

    ``groups`` are those of windowed and of full layers. The router's products are computed, but
    the experts are chosen by random logits, so that routing is uniform.
    """

    def __init__(
        self, ops: Ops, shape: Shape, layers: list[Layer], groups: tuple[Group, Group], tokens: int
    ) -> None:
        self.ops, self.shape, self.layers = ops, shape, layers
        self.plans = [groups[i % 2].plan for i in range(len(layers))]
        device = layers[0].norm.device
        self.caches = [groups[i % 2].caches(shape, device) for i in range(len(layers))]
        self.x = _normal(device, tokens, shape.hidden)
        angle = torch.rand(tokens, 1, shape.size // 2, device=device) * 6
        self.cos = torch.cat((angle.cos(), angle.cos()), -1).bfloat16()
        self.sin = torch.cat((-angle.sin(), angle.sin()), -1).bfloat16()
        self.logits = [_normal(device, tokens, shape.experts) for _ in layers]

    def decode(self) -> Tensor:
        """The residual sum [T, D] after the last layer."""
        ops, shape = self.ops, self.shape
        x, delta = self.x, torch.zeros_like(self.x)
        parts = [shape.heads, shape.kv_heads, shape.kv_heads]
        for i, layer in enumerate(self.layers):
            plan, cache = self.plans[i], self.caches[i]
            h, x = ops.add_rms_norm(delta, x, layer.norm, 1e-5)
            qkv = ops.linear(h, layer.qkv, layer.qkv_bias).unflatten(-1, (-1, shape.size))
            q, k, v = qkv.split(parts, 1)
            q = ops.rope_kv_write(q, k, v, self.cos, self.sin, *cache, plan.slots)
            h = ops.paged_attention(q, *cache, plan, layer.sinks, shape.size**-0.5)
            delta = ops.linear(h, layer.o, layer.o_bias)
            h, x = ops.add_rms_norm(delta, x, layer.norm, 1e-5)
            ops.linear(h, layer.router, None)
            ids, weights = ops.route(self.logits[i], shape.k, plan.slots)
            delta = layer.moe(h, ids, weights)
        total: Tensor = x + delta
        return total


def measure(run: Callable[[], object], flush: bool = True) -> float:
    """Median seconds of replays of ``run`` as a CUDA graph, between events on the device.

    With ``flush``, 256 MiB are written before every replay, outside the events, so that nothing
    that the kernel reads is in the L2 cache. The time holds the launch of one graph.
    """
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    dirt = torch.empty(FLUSH if flush else 1, dtype=torch.uint8, device="cuda")
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(REPLAYS + 3)]
    for before, after in events:
        dirt.zero_()
        before.record()
        graph.replay()
        after.record()
    torch.cuda.synchronize()
    times: list[float] = [before.elapsed_time(after) for before, after in events[3:]]
    return median(times) / 1e3
