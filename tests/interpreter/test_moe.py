"""Routing and experts under Triton's interpreter against the reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import configurations, int4, moe, nvfp4, reference
from kernels.configurations import Experts, Tile, Tiles
from kernels.int4 import Int4
from kernels.mxfp4 import MXFP4, dequantize
from kernels.nvfp4 import NVFP4
from kernels.packed import Packed, pack, quantize_mxfp8, quantize_nvfp4
from tests.checkpoints import quantize_mxfp4

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
SMALL = Experts(
    Tiles(Tile(16, 32, 32, 4, 1), Tile(32, 32, 32, 4, 1), Tile(64, 32, 64, 4, 1)),
    Tiles(Tile(16, 32, 0, 4, 1), Tile(32, 32, 0, 4, 1), Tile(64, 32, 0, 4, 1)),
    Tiles(Tile(16, 32, 128, 4, 1), Tile(32, 32, 128, 4, 1), Tile(128, 32, 128, 4, 1)),
)


def close(ours: Tensor, theirs: Tensor) -> None:
    assert not ours.isnan().any()
    scale = max(1.0, float(theirs.abs().max()))
    tolerance = TOLERANCE[ours.dtype]
    torch.testing.assert_close(ours.float(), theirs.float(), atol=tolerance * scale, rtol=0)


@pytest.mark.parametrize("experts", [(1, 1), (5, 3), (32, 4), (128, 4)])
def test_route(experts: tuple[int, int]) -> None:
    count, k = experts
    logits = torch.randn(9, count, generator=torch.Generator().manual_seed(0))
    slots = torch.arange(9)
    slots[-2:] = -1  # padding
    expected_ids, expected = reference.route(logits, k, slots)
    ids, weights = moe.route(logits, k, slots)
    assert torch.equal(ids.long(), expected_ids)
    assert (ids[-2:] == -1).all()
    torch.testing.assert_close(weights, expected)


def test_the_first_of_equal_logits_is_chosen() -> None:
    ids, weights = moe.route(torch.tensor([[1.0, 2.0, 2.0, 1.0, 2.0]]), 2, torch.zeros(1).long())
    assert ids.tolist() == [[1, 2]]
    assert weights.tolist() == [[0.5, 0.5]]


def test_packed_words_hold_every_number() -> None:
    """All 16 values in all places of a word, with the smallest and largest scales."""
    blocks = torch.arange(256, dtype=torch.uint8).repeat(3, 2).view(1, 6, 16, 16)
    scales = torch.tensor([0, 1, 100, 127, 128, 60], dtype=torch.uint8)
    scales = scales[:, None].repeat(1, 16)[None]
    packed = pack(MXFP4(blocks, scales))
    assert isinstance(packed, Packed)
    expected = dequantize(MXFP4(blocks, scales), torch.float32)
    identity = torch.eye(512)
    order, offsets = torch.arange(512, dtype=torch.int32), torch.tensor([0, 512]).int()
    ours = torch.full((512, 6), torch.nan)
    moe._product(
        identity,
        packed,
        None,
        torch.ones(512),
        ours,
        order,
        offsets,
        1,
        1,
        0.0,
        0.0,
        False,
        SMALL.words.large,
    )
    assert torch.equal(ours.T[None], expected)
    with pytest.raises(ValueError, match=r"scale of 2\^2 is above 2"):
        pack(MXFP4(blocks, torch.full_like(scales, 129)))


@settings(max_examples=25)
@given(
    dtype=st.sampled_from(list(TOLERANCE)),
    tokens=st.sampled_from([1, 2, 17, 63]),
    shape=st.sampled_from([(4, 32, 32), (8, 96, 160), (5, 64, 100)]),
    mxfp4=st.booleans(),
    skew=st.sampled_from(["spread", "one", "elsewhere"]),
    bias=st.booleans(),
)
def test_experts(
    dtype: torch.dtype,
    tokens: int,
    shape: tuple[int, int, int],
    mxfp4: bool,
    skew: str,
    bias: bool,
) -> None:
    """Experts 2 .. of 16 on this rank; all tokens to one expert, or most to other ranks'."""
    draw = torch.Generator().manual_seed(tokens)
    count, inner, hidden = shape
    if mxfp4:
        hidden = hidden // 32 * 32

    def randn(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=draw)

    x, logits = randn(tokens, hidden).to(dtype), randn(tokens, 16)
    if skew != "spread":
        logits[:, 3 if skew == "one" else 14] += 100
    b13, b2 = randn(count, 2 * inner).to(dtype), randn(count, hidden).to(dtype)
    w13, w2 = randn(count, 2 * inner, hidden) * 0.3, randn(count, hidden, inner) * 0.3
    ids, weights = reference.route(logits, 3, torch.arange(tokens))
    ids = ids.int()
    matrices = [MXFP4(*quantize_mxfp4(w)) if mxfp4 else w.to(dtype) for w in (w13, w2)]
    packed = [pack(w) for w in matrices]
    rest = (2, 7.0, 1.702)
    last = b2 if bias else None
    wide = [dequantize(w, torch.float32) if isinstance(w, MXFP4) else w.float() for w in matrices]
    expected = reference.experts(
        x.float(), ids, weights, wide[0], b13.float(), wide[1],
        None if last is None else last.float(), *rest,
    )  # fmt: skip
    ours = moe.experts(x, ids, weights, packed[0], b13, packed[1], last, *rest, config=SMALL)
    close(ours, expected)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("form", ["dense", "words", "scaled", "nvfp4"])
def test_rows_never_depend_on_their_batch(form: str) -> None:
    draw = torch.Generator().manual_seed(0)
    x, logits = torch.randn(70, 64, generator=draw), torch.randn(70, 8, generator=draw)
    matrices = torch.randn(8, 64, 64, generator=draw), torch.randn(8, 64, 32, generator=draw)
    packed = [MXFP4(*quantize_mxfp4(w)) for w in matrices]
    w13, w2 = {
        "dense": matrices,
        "words": [pack(w) for w in packed],
        "scaled": [pack(w, native=True) for w in packed],
        "nvfp4": [
            pack(nvfp4.quantize(w, w.abs().amax((1, 2)) / nvfp4.LARGEST), native=True)
            for w in matrices
        ],
    }[form]
    b13, b2 = torch.randn(2, 8, 64, generator=draw)
    ids, weights = moe.route(logits, 3, torch.arange(70))
    config = configurations.experts("generic", invariant=True)

    def some(first: int, last: int) -> Tensor:
        mine = slice(first, last)
        return moe.experts(
            x[mine], ids[mine], weights[mine], w13, b13, w2, b2, 0, 7.0, 1.702, config=config
        )

    expected = some(0, 70)
    for first, last in ((0, 1), (3, 20), (69, 70)):
        assert torch.equal(some(first, last), expected[first:last])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [32, 96, 2880])
def test_quantize_mxfp8(dtype: torch.dtype, width: int) -> None:
    """To the bit, with blocks of zeros, tiny numbers and numbers that saturate."""
    x = torch.randn(17, width, generator=torch.Generator().manual_seed(0))
    x *= 2.0 ** torch.arange(-8, 9)[:, None]
    x[0], x[1, :32], x[2, 0], x[3, 0] = 0, 1e-36, 511.0, 1e30
    x = x.to(dtype)
    values, scales = quantize_mxfp8(x)
    expected, expected_scales = reference.quantize_mxfp8(x)
    blocks = width // 32
    assert torch.equal(scales[:, :blocks], expected_scales)
    assert torch.equal(values[:, :width].view(torch.uint8), expected.view(torch.uint8))
    assert not values[:, width:].view(torch.uint8).any()
    restored = torch.ldexp(
        expected.float().unflatten(1, (-1, 32)), scales[:, :blocks, None] - 127.0
    )
    close_to = x.float().unflatten(1, (-1, 32))
    most = close_to.abs().amax(-1, keepdim=True)
    assert ((restored - close_to).abs() <= most / 8 + 1e-38).all()
    x[5, 3] = torch.nan
    assert quantize_mxfp8(x)[0].float().isnan().nonzero().tolist() == [[5, 3]]


# Rows of pairs that are not on this rank are never written, and rounded as they are.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("tokens", [1, 17, 140])
@pytest.mark.parametrize("skew", [False, True])
def test_scaled_experts(tokens: int, skew: bool) -> None:
    """Blocks with scales on both sides, as sm_100's tensor cores take them: against the reference
    with activations rounded to mxfp8 before both products (error below 2 % of the largest value),
    and against exact ones (8 % of the norm)."""
    draw = torch.Generator().manual_seed(tokens)
    count, hidden, inner = 4, 160, 96
    x = torch.randn(tokens, hidden, generator=draw).bfloat16()
    logits = torch.randn(tokens, 8, generator=draw)
    logits[:, 3] += 100 * skew
    slots = torch.arange(tokens)
    slots[1:2] = -1
    ids, weights = moe.route(logits, 3, slots)
    w13 = MXFP4(*quantize_mxfp4(torch.randn(count, 2 * inner, hidden, generator=draw) * 0.3))
    w2 = MXFP4(*quantize_mxfp4(torch.randn(count, hidden, inner, generator=draw) * 0.3))
    b13, b2 = (torch.randn(count, n, generator=draw).bfloat16() for n in (2 * inner, hidden))

    def expected(activations: Callable[[Tensor], Tensor]) -> Tensor:
        rest = (w13, b13, w2, b2, 2, 7.0, 1.702, False, activations)
        return reference.experts(x, ids, weights, *rest).float()

    rest = (pack(w13, native=True), b13, pack(w2, native=True), b2, 2, 7.0, 1.702)
    ours = moe.experts(x, ids, weights, *rest, config=SMALL).float()
    exact = expected(lambda x: x)
    largest = float(exact.abs().max())
    assert (ours - expected(reference.as_mxfp8)).abs().max() < 0.02 * largest
    assert (ours - exact).norm() < 0.08 * exact.norm()
    assert not ours[1:2].any(), "padding went to an expert"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("plain", [False, True])
def test_int4_experts(dtype: torch.dtype, tokens: int, plain: bool) -> None:
    """Every integer in every place, and both kinds of SwiGLU."""
    draw = torch.Generator().manual_seed(tokens)
    count, hidden, inner = 4, 256, 128

    def random(rows: int, depth: int) -> Int4:
        size = (count, rows, depth // 8)
        words = torch.randint(-(2**31), 2**31, size, generator=draw).int()
        scales = torch.rand(count, rows, depth // 128, generator=draw) * 0.05
        return Int4(words, scales.bfloat16())

    w13, w2 = random(2 * inner, hidden), random(hidden, inner)
    x = torch.randn(tokens, hidden, generator=draw).to(dtype)
    b13, b2 = (torch.randn(count, n, generator=draw).to(dtype) for n in (2 * inner, hidden))
    logits = torch.randn(tokens, 8, generator=draw)
    ids, weights = moe.route(logits, 3, torch.arange(tokens))
    rest = (b2, 2, 7.0, 1.702, plain)
    ours = moe.experts(x, ids, weights, pack(w13), b13, pack(w2), *rest, config=SMALL)
    wide = [int4.dequantize(w, dtype).float() for w in (w13, w2)]
    close(
        ours,
        reference.experts(
            x.float(), ids, weights, wide[0], b13.float(), wide[1], b2.float(), *rest[1:]
        ),
    )
    close(ours, reference.experts(x, ids, weights, w13, b13, w2, *rest))


def random_nvfp4(draw: torch.Generator, *shape: int) -> NVFP4:
    """All numbers, and scales from 0 to e4m3's largest."""
    rows = shape[:-1]
    blocks = torch.randint(0, 256, (*rows, shape[-1] // 2), generator=draw).to(torch.uint8)
    scales = torch.randint(0, 127, (*rows, shape[-1] // 16), generator=draw).to(torch.uint8)
    factors = torch.rand(shape[0], generator=draw) * 1e-4
    return NVFP4(blocks, scales.view(torch.float8_e4m3fn), factors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nvfp4_words_hold_every_number(dtype: torch.dtype) -> None:
    """Times the factor, which is applied to the sum; with every scale there is."""
    draw = torch.Generator().manual_seed(0)
    w = random_nvfp4(draw, 1, 30, 224)
    w.scales.view(torch.uint8)[0, :9] = torch.arange(126).view(9, 14)
    packed = pack(w)
    assert isinstance(packed, Packed)
    order, offsets = torch.arange(224, dtype=torch.int32), torch.tensor([0, 224]).int()
    ours = torch.full((224, 30), torch.nan)
    moe._product(
        torch.eye(224, dtype=dtype), packed, None, torch.ones(224), ours,
        order, offsets, 1, 1, 0.0, 0.0, False, SMALL.words.large,
    )  # fmt: skip
    assert torch.equal(ours.T[None], nvfp4.dequantize(w, torch.float32))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [32, 96, 2880])
def test_quantize_nvfp4(dtype: torch.dtype, width: int) -> None:
    """To the bit, with blocks of zeros, tiny numbers, ties and what is not a number."""
    x = torch.randn(17, width, generator=torch.Generator().manual_seed(0))
    x *= 2.0 ** torch.arange(-8, 9)[:, None]
    x[0], x[1, :16], x[2, 0] = 0, 1e-36, 1e30
    # Divisible by 6 * 448 and 448: scales are 448 and 0.25, 0.5 ... of a number are exact.
    x[3] = 0
    x[3, :16] = torch.tensor([6.0, *(0.25 + 0.5 * torch.arange(15) % 6)]) * 448
    x = x.to(dtype)
    blocks, scales, factors = quantize_nvfp4(x)
    expected = reference.quantize_nvfp4(x)
    assert torch.equal(factors, expected.factors)
    assert torch.equal(scales[:, : width // 16].float(), expected.scales.float())
    assert torch.equal(blocks[:, : width // 2], expected.blocks)
    assert not blocks[:, width // 2 :].any()
    assert not scales[:, width // 16 :].float().any()
    # 4 bits and scales of 4: off by at most a 6th and a 16th of a block's largest.
    near = x[4:].float().unflatten(1, (-1, 16))
    off = reference.as_nvfp4(x[4:].float()).unflatten(1, (-1, 16)) - near
    most = near.abs().amax(-1, keepdim=True)
    assert (off.abs() <= most * (1 / 6 + 1 / 16)).all()
    assert (off.norm() < 0.12 * near.norm()).all()
    x[5, 3] = torch.nan
    factors = quantize_nvfp4(x)[2]
    assert factors.isnan().nonzero().tolist() == [[5]]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("tokens", [1, 17, 140])
def test_nvfp4_experts(native: bool, tokens: int) -> None:
    """Unpacked in registers: exact. Times NVFP4 activations: against the reference with these."""
    draw = torch.Generator().manual_seed(tokens)
    count, hidden, inner = 4, 160, 96
    w13, w2 = (
        nvfp4.quantize(w, w.abs().amax((1, 2)) / nvfp4.LARGEST)
        for w in (
            torch.randn(count, 2 * inner, hidden, generator=draw) * 0.3,
            torch.randn(count, hidden, inner, generator=draw) * 0.3,
        )
    )
    dtype = torch.float32 if native else torch.bfloat16
    x = torch.randn(tokens, hidden, generator=draw).to(dtype)
    b13, b2 = (torch.randn(count, n, generator=draw).to(dtype) for n in (2 * inner, hidden))
    ids, weights = moe.route(torch.randn(tokens, 8, generator=draw), 3, torch.arange(tokens))
    rest = (2, 7.0, 1.702, True)
    packed = pack(w13, native), pack(w2, native)
    ours = moe.experts(x, ids, weights, packed[0], b13, packed[1], b2, *rest, config=SMALL).float()

    def expected(activations: Callable[[Tensor], Tensor]) -> Tensor:
        return reference.experts(x, ids, weights, w13, b13, w2, b2, *rest, activations).float()

    exact = expected(lambda x: x)
    if not native:
        close(ours.bfloat16(), exact)
        return
    # In bf16, many of the first product would fall into the next of 8 numbers.
    assert (ours - expected(reference.as_nvfp4)).norm() < 0.003 * exact.norm()
    assert (ours - exact).norm() < 0.25 * exact.norm()
