"""Every kernel against its reference: odd sizes, poisoned memory, one tolerance per dtype."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import cpu, exact, reference
from kernels.dispatch import Shapes, choose
from kernels.mxfp4 import MXFP4, dequantize
from kernels.reference import Rows
from tests.checkpoints import quantize_mxfp4

CPU = torch.device("cpu")
KERNELS = {torch.float32: exact, torch.bfloat16: cpu}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
DTYPES = st.sampled_from(list(KERNELS))
KV_DTYPES = st.sampled_from([None, torch.float8_e4m3fn])  # None: as the activations


def close(ours: Tensor, theirs: Tensor) -> None:
    assert not ours.isnan().any(), "something poisoned was read"
    tolerance = TOLERANCE[ours.dtype]
    scale = max(1.0, float(theirs.float().abs().max()))
    torch.testing.assert_close(ours.float(), theirs.float(), atol=tolerance * scale, rtol=0)


class Scene:
    """A step's rows in a cache where all that must not be read is NaN."""

    def __init__(
        self,
        rows: Sequence[tuple[int, int]],  # (start, count)
        *,
        heads: int,
        kv_heads: int,
        size: int,
        block_size: int,
        window: int,
        dtype: torch.dtype,
        kv_dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.starts = np.array([start for start, _ in rows], np.int64)
        self.counts = np.array([count for _, count in rows], np.int64)
        pages = -(-(self.starts + self.counts) // block_size)
        total = int(pages.sum()) + 3
        order = torch.randperm(total, generator=draw).numpy()
        # Stale entries, before the window and past the end, lead to a block that nobody owns.
        tables = np.full((len(rows), int(pages.max()) + 1), order[-1], np.int32)
        kept = kv_dtype or dtype
        cache = torch.full((2, total + 1, block_size, kv_heads, size), torch.nan, dtype=kept)
        cache[:, total] = 0
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        at = 0
        for row, (start, count) in enumerate(rows):
            first = max(0, start - window + 1) if window else 0
            k, v = torch.randn(2, start + count, kv_heads, size, generator=draw).to(kept)
            self.keys.append(k)
            self.values.append(v)
            for page in range(first // block_size, pages[row]):
                tables[row, page] = order[at]
                at += 1
            for position in range(first, start):
                block = tables[row, position // block_size]
                cache[0, block, position % block_size] = k[position]
                cache[1, block, position % block_size] = v[position]
        self.k_cache, self.v_cache = cache.flatten(1, 2).unbind()
        self.rows = Rows(
            torch.from_numpy(self.starts),
            torch.from_numpy(self.counts),
            torch.arange(len(rows)),
            torch.from_numpy(tables),
            torch.from_numpy(tables),
            int(self.counts.sum()),
            block_size,
            total,
            window,
        )
        tokens = int(self.counts.sum())
        self.q = torch.randn(tokens, heads, size, generator=draw).to(dtype)
        self.sinks = torch.randn(heads, generator=draw).to(dtype)
        self.scale, self.window = size**-0.5, window

    def attend(self, kernels: object) -> Tensor:
        """Write the step's keys and values, then attend, with one implementation."""
        plan = kernels.plan(self.rows, lambda tensor: tensor)  # type: ignore[attr-defined]
        k_cache, v_cache = self.k_cache.clone(), self.v_cache.clone()
        new = [slice(int(s), int(s + c)) for s, c in zip(self.starts, self.counts, strict=True)]
        k = torch.cat([k[part] for k, part in zip(self.keys, new, strict=True)])
        v = torch.cat([v[part] for v, part in zip(self.values, new, strict=True)])
        k_cache[plan.slots], v_cache[plan.slots] = k, v
        out: Tensor = kernels.paged_attention(  # type: ignore[attr-defined]
            self.q, k_cache, v_cache, plan, self.sinks, self.scale
        )
        return out

    def expected(self) -> Tensor:
        """Softmax over all keys a query sees and the sink as one more column, row by row."""
        out, at = [], 0
        group = self.q.shape[1] // self.keys[0].shape[1]
        for start, count, k, v in zip(
            self.starts, self.counts, self.keys, self.values, strict=True
        ):
            for position in range(start, start + count):
                low = max(0, position - self.window + 1) if self.window else 0
                keys = k[low : position + 1].double().repeat_interleave(group, 1)
                values = v[low : position + 1].double().repeat_interleave(group, 1)
                scores = torch.einsum("hd,khd->hk", self.q[at].double(), keys) * self.scale
                weights = torch.cat((scores, self.sinks.double()[:, None]), 1).softmax(1)
                out.append(torch.einsum("hk,khd->hd", weights[:, :-1], values).flatten())
                at += 1
        return torch.stack(out)


@settings(max_examples=60)
@given(
    dtype=DTYPES,
    rows=st.lists(
        st.tuples(st.integers(0, 150), st.sampled_from([1, 1, 1, 2, 7, 40, 130])),
        min_size=1,
        max_size=6,
    ),
    heads=st.sampled_from([(8, 2), (4, 4), (6, 1)]),
    size=st.sampled_from([16, 32, 64]),
    block_size=st.sampled_from([4, 16]),
    window=st.sampled_from([0, 1, 8, 33]),
    use_reference=st.booleans(),
    kv_dtype=KV_DTYPES,
)
def test_attention(
    dtype: torch.dtype,
    rows: list[tuple[int, int]],
    heads: tuple[int, int],
    size: int,
    block_size: int,
    window: int,
    use_reference: bool,
    kv_dtype: torch.dtype | None,
) -> None:
    scene = Scene(
        rows,
        heads=heads[0],
        kv_heads=heads[1],
        size=size,
        block_size=block_size,
        window=window,
        dtype=dtype,
        kv_dtype=kv_dtype,
    )
    close(scene.attend(reference if use_reference else KERNELS[dtype]), scene.expected())


def experts_case(
    dtype: torch.dtype, tokens: int, mxfp4: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, ids, weights, w13, b13, w2, b2 of 8 experts, 3 for each token."""
    draw = torch.Generator().manual_seed(0)
    count, inner, k, hidden = 8, 96, 3, 64

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    x, logits = randn(tokens, hidden), randn(tokens, count)
    w13, b13 = randn(count, 2 * inner, hidden) * 0.5, randn(count, 2 * inner)
    w2, b2 = randn(count, hidden, inner) * 0.2, randn(count, hidden)
    ids, weights = reference.route(logits, k, torch.arange(len(logits)))
    if mxfp4:
        w13, w2 = (dequantize(MXFP4(*quantize_mxfp4(w)), dtype) for w in (w13, w2))
    x, w13, b13, w2, b2 = (t.to(dtype) for t in (x, w13, b13, w2, b2))
    return x, ids, weights, w13, b13, w2, b2


@pytest.mark.parametrize("dtype", KERNELS)
@pytest.mark.parametrize("tokens", [1, 5, 33])
def test_experts(dtype: torch.dtype, tokens: int) -> None:
    x, ids, weights, w13, b13, w2, b2 = experts_case(dtype, tokens, mxfp4=False)
    rest = (0, 7.0, 1.702)
    wide = [t.double() for t in (x, w13, b13, w2, b2)]
    expected = torch.zeros_like(wide[0])
    for token in range(tokens):
        for e, weight in zip(ids[token].tolist(), weights[token].tolist(), strict=True):
            h = wide[1][e] @ wide[0][token] + wide[2][e]
            gate, up = h[0::2].clamp(max=7), h[1::2].clamp(-7, 7)
            h = gate * torch.sigmoid(1.702 * gate) * (up + 1)
            expected[token] += weight * (wide[3][e] @ h + wide[4][e])
    for kernels in (reference, KERNELS[dtype]):
        close(kernels.experts(x, ids, weights, w13, b13, w2, b2, *rest), expected)


@pytest.mark.parametrize("dtype", KERNELS)
@pytest.mark.parametrize("kernels", ["own", "reference"])
@pytest.mark.parametrize("tokens", [19, 90])  # few and many for each expert
def test_experts_of_ranks_add_up(dtype: torch.dtype, kernels: str, tokens: int) -> None:
    """Whole experts on several ranks, unevenly; and a cut through all of them, the bias once."""
    x, ids, weights, w13, b13, w2, b2 = experts_case(dtype, tokens, mxfp4=True)
    experts = (KERNELS[dtype] if kernels == "own" else reference).experts
    whole = experts(x, ids, weights, w13, b13, w2, b2, 0, 7.0, 1.702)
    total = torch.zeros_like(whole, dtype=torch.float32)
    for cut in (slice(0, 3), slice(3, 4), slice(4, 8)):
        part = (w13[cut], b13[cut], w2[cut], b2[cut])
        total += experts(x, ids, weights, *part, cut.start, 7.0, 1.702).float()
    close(total.to(dtype), whole)
    total.zero_()
    for first, last in ((0, 64), (64, 96)):
        rows = slice(2 * first, 2 * last)
        bias = b2 if first == 0 else None
        part2 = w2[:, :, first:last].contiguous()
        total += experts(
            x, ids, weights, w13[:, rows], b13[:, rows], part2, bias, 0, 7.0, 1.702
        ).float()
    close(total.to(dtype), whole)


@pytest.mark.parametrize("dtype", KERNELS)
@pytest.mark.parametrize("kernels", ["own", "reference"])
def test_packed_experts_equal_dequantised_ones(dtype: torch.dtype, kernels: str) -> None:
    experts = (KERNELS[dtype] if kernels == "own" else reference).experts
    draw = torch.Generator().manual_seed(3)
    packed = [
        MXFP4(*quantize_mxfp4(torch.randn(*shape, generator=draw)))
        for shape in ((8, 192, 64), (8, 64, 96))
    ]
    x, ids, weights, _, b13, _, b2 = experts_case(dtype, 7, mxfp4=False)
    rest = (0, 7.0, 1.702)
    both = [
        experts(x, ids, weights, w13, b13, w2, b2, *rest)
        for w13, w2 in (packed, [dequantize(w, dtype) for w in packed])
    ]
    close(both[0], both[1])


def test_swiglu_clamps_the_gate_from_above_only() -> None:
    x = torch.tensor([[-20.0, 20.0, 20.0, -20.0, -7.5, 0.0]])
    gate, up = torch.tensor([-20.0, 7.0, -7.5]), torch.tensor([7.0, -7.0, 0.0])
    expected = (gate * torch.sigmoid(1.702 * gate) * (up + 1))[None]
    for swiglu in (reference.swiglu, exact.swiglu):
        ours = swiglu(x, 7.0, 1.702)
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=0)
        assert ours[0, 0] != swiglu(torch.tensor([[-7.0, 20.0]]), 7.0, 1.702)[0, 0]


@pytest.mark.parametrize("dtype", KERNELS)
def test_norms_and_linear(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    for tokens, width in ((1, 17), (5, 64), (40, 96)):
        x, residual = torch.randn(2, tokens, width, generator=draw).mul(3).to(dtype)
        weight = torch.rand(width, generator=draw).to(dtype)
        ops = choose("auto", CPU, Shapes(dtype, 4, 2, 16))
        wide = x.double()
        rms = (wide.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt()
        close(ops.rms_norm(x, weight, 1e-5), wide * rms * weight.double())
        normed, total = ops.add_rms_norm(x, residual, weight, 1e-5)
        assert torch.equal(total, residual + x)
        close(normed, reference.rms_norm(total, weight, 1e-5))
        matrix, bias = torch.randn(33, width, generator=draw).to(dtype), x.new_ones(33)
        close(ops.linear(x, matrix, bias), F.linear(x.double(), matrix.double(), bias.double()))


def test_norms_round_once() -> None:
    """gpt-oss multiplies by the weight in fp32; rounding before that changes many bits."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(8, 256, generator=draw).mul(3).bfloat16()
    weight = torch.rand(256, generator=draw).bfloat16()
    wide = x.float() * (x.float().pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt()
    once, twice = (wide * weight.float()).bfloat16(), wide.bfloat16() * weight
    assert (once != twice).float().mean() > 0.1
    for home in ("reference", "cpu"):
        ops = choose(home, CPU, Shapes(torch.bfloat16, 4, 2, 16))
        assert torch.equal(ops.rms_norm(x, weight, 1e-5), once)
        assert torch.equal(ops.add_rms_norm(x, torch.zeros_like(x), weight, 1e-5)[0], once)
    assert torch.equal(reference.rms_norm(x, weight, 1e-5, round_first=True), twice)


def test_rope_turns_pairs_of_halves() -> None:
    draw = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 5, 4, 16, generator=draw)
    angle = torch.rand(5, 8, generator=draw) * 6
    cos = torch.cat((angle.cos(), angle.cos()), -1)[:, None]
    sin = torch.cat((-angle.sin(), angle.sin()), -1)[:, None]
    for x in (q, k):
        ours = reference.rope(x, cos, sin)
        turned = torch.complex(x[..., :8], x[..., 8:]) * torch.polar(
            torch.ones(5, 1, 8), angle[:, None]
        )
        torch.testing.assert_close(ours, torch.cat((turned.real, turned.imag), -1))


def test_route_weighs_the_chosen_experts_only() -> None:
    logits = torch.tensor([[1.0, 5.0, 3.0, -2.0], [0.0, 0.0, 9.0, 1.0]])
    ids, weights = reference.route(logits, 2, torch.arange(len(logits)))
    assert ids.tolist() == [[1, 2], [2, 3]]
    expected = torch.stack((logits[0, [1, 2]].softmax(0), logits[1, [2, 3]].softmax(0)))
    torch.testing.assert_close(weights, expected)


@pytest.mark.parametrize("dtype", KERNELS)
def test_mxfp4_equals_the_definition(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 5, 2, 16), generator=draw, dtype=torch.uint8)
    scales = torch.randint(100, 150, (3, 5, 2), generator=draw, dtype=torch.uint8)
    ours = dequantize(MXFP4(blocks, scales), dtype)
    assert ours.shape == (3, 5, 64)
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    for place in ((0, 0, 0, 0), (2, 4, 1, 15), (1, 3, 0, 7)):
        expert, row, block, byte = place
        for half, nibble in ((0, int(blocks[place]) & 15), (1, int(blocks[place]) >> 4)):
            sign = -1 if nibble & 8 else 1
            expected = sign * values[nibble & 7] * 2.0 ** (int(scales[expert, row, block]) - 127)
            assert float(ours[expert, row, 32 * block + 2 * byte + half]) == expected


BATCHES = {
    "others": st.lists(st.integers(1, 70), max_size=5),
    "window": st.sampled_from([0, 8]),
    "cuts": st.lists(st.integers(1, 59), max_size=4, unique=True),
    "kv_dtype": KV_DTYPES,
}


def assert_batch_invariant(
    attend: Callable[[Scene], Tensor],
    others: list[int],
    window: int,
    cuts: list[int],
    kv_dtype: torch.dtype | None,
) -> None:
    """Attention of one sequence of 60 tokens: at once, chunked anywhere, and among others."""
    how = {
        "heads": 4,
        "kv_heads": 2,
        "size": 16,
        "block_size": 4,
        "window": window,
        "dtype": torch.float32,
        "kv_dtype": kv_dtype,
    }
    whole = Scene([(0, 60)], **how)  # type: ignore[arg-type]
    expected = attend(whole)
    edges = [0, *sorted(cuts), 60]
    for first, last in itertools.pairwise(edges):
        rows = [(first, last - first), *((length // 2, length) for length in others)]
        scene = Scene(rows, **how, seed=1)  # type: ignore[arg-type]
        held = torch.arange(max(0, first - window + 1) if window else 0, first)
        slots = scene.rows.slots(0, held)
        scene.k_cache[slots], scene.v_cache[slots] = whole.keys[0][held], whole.values[0][held]
        scene.keys[0], scene.values[0] = whole.keys[0][:last], whole.values[0][:last]
        scene.q[: last - first] = whole.q[first:last]
        scene.sinks = whole.sinks
        assert torch.equal(attend(scene)[: last - first], expected[first:last])


@settings(max_examples=25)
@given(**BATCHES)
def test_exact_rows_never_depend_on_their_batch(
    others: list[int], window: int, cuts: list[int], kv_dtype: torch.dtype | None
) -> None:
    assert_batch_invariant(lambda scene: scene.attend(exact), others, window, cuts, kv_dtype)


def test_exact_products_never_depend_on_their_batch() -> None:
    draw = torch.Generator().manual_seed(0)
    x, w = torch.randn(70, 96, generator=draw), torch.randn(50, 96, generator=draw)
    expected = exact.linear(x, w, None)
    case = experts_case(torch.float32, 70, mxfp4=False)
    moe = exact.experts(*case, 0, 7.0, 1.702)
    for first, last in ((0, 1), (3, 20), (17, 70), (69, 70)):
        assert torch.equal(exact.linear(x[first:last], w, None), expected[first:last])
        x_part, ids, weights = (t[first:last] for t in case[:3])
        part = exact.experts(x_part, ids, weights, *case[3:], 0, 7.0, 1.702)
        assert torch.equal(part, moe[first:last])


def test_dispatch_says_what_runs_and_refuses_what_cannot() -> None:
    bf16, fp32 = Shapes(torch.bfloat16, 4, 2, 16), Shapes(torch.float32, 4, 2, 16)

    def homes(kernels: str, shapes: Shapes) -> dict[str, str]:
        return {op: home for op, home, _ in choose(kernels, CPU, shapes).table}

    assert homes("auto", bf16)["experts"] == "cpu"
    assert homes("auto", fp32)["experts"] == "exact"
    assert {*homes("reference", fp32).values()} == {"reference"}
    fp8 = torch.float8_e4m3fn
    with pytest.raises(ValueError, match=r"fp8 needs sm_89 or newer, this GPU is sm_86"):
        choose(
            "auto", torch.device("cuda"), Shapes(torch.bfloat16, 4, 2, 16, arch=86, kv_dtype=fp8)
        )
    with pytest.raises(ValueError, match=r"KV cache in torch.float16 .* torch.float8_e4m3fn"):
        choose("auto", CPU, Shapes(torch.bfloat16, 4, 2, 16, kv_dtype=torch.float16))
    with pytest.raises(ValueError, match="triton needs a CUDA device"):
        choose("triton", CPU, bf16)
    with pytest.raises(ValueError, match="cannot run on cuda"):
        choose("cpu", torch.device("cuda"), bf16)
    with pytest.raises(ValueError, match="needs --dtype float32"):
        choose("auto", CPU, Shapes(torch.bfloat16, 4, 2, 16, batch_invariant=True))
    with pytest.raises(ValueError, match="does not go with --kernels reference"):
        choose("reference", CPU, Shapes(torch.float32, 4, 2, 16, batch_invariant=True))
