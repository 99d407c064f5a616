"""Sampling under Triton's interpreter: noise to the bit, filters and penalties as the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import reference, sampling
from kernels.dispatch import Shapes, choose
from kernels.reference import PROMPT, Draws
from workers.sampler import Sampler
from workers.wire import Join, Sampling


@triton.jit  # type: ignore[untyped-decorator]
def _noise(keys_ptr, bits_ptr, noise_ptr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0)
    v = tl.arange(0, COLUMNS)
    low = tl.load(keys_ptr + 2 * row).to(tl.uint32, bitcast=True)
    high = tl.load(keys_ptr + 2 * row + 1).to(tl.uint32, bitcast=True)
    bits = sampling._bits(low, high, v)
    tl.store(bits_ptr + row * COLUMNS + v, bits.to(tl.int32, bitcast=True))
    tl.store(noise_ptr + row * COLUMNS + v, sampling._gumbel(bits))


def keys(rows: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, (rows, 2), generator=draw).int()


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_noise_has_the_same_integers_and_nearly_the_same_floats() -> None:
    """Floats within 2 units in the last place (of 1 where the noise is smaller) of the CPU's, and
    3 of the truth: numpy's logarithm is not exact either."""
    rows, columns = 4, 8192
    given_keys = keys(rows)
    bits, noise = torch.empty(rows, columns, dtype=torch.int32), torch.empty(rows, columns)
    _noise[(rows,)](given_keys, bits, noise, COLUMNS=columns)
    words = given_keys.numpy().view(np.uint32)

    def scramble(h: Any) -> Any:
        h = (h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B)
        h = (h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35)
        return h ^ (h >> np.uint32(16))

    ids = np.arange(columns, dtype=np.uint32) * np.uint32(0x9E3779B1)
    expected = scramble(scramble(ids ^ words[:, :1]) ^ words[:, 1:])
    assert np.array_equal(bits.numpy().view(np.uint32), expected)
    uniform = (expected & np.uint32(0x7FFFFFFF)).astype(np.float32) + np.float32(0.5)
    uniform = np.minimum(uniform * np.float32(2**-31), np.float32(1 - 2**-24))
    exact = -np.log(-np.log1p(-uniform.astype(np.float64)))
    unit = np.spacing(np.maximum(np.abs(exact), 1).astype(np.float32))
    assert (np.abs(noise.numpy() - exact) <= 3 * unit).all()
    cpu = reference.gumbel(given_keys, columns).numpy()
    assert (np.abs(noise.numpy() - cpu) <= 2 * unit).all()


@settings(max_examples=15)
@given(
    seed=st.integers(0, 1000),
    vocab=st.sampled_from([1, 17, 63, 1100]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    rows=st.lists(
        st.tuples(
            st.sampled_from([0.0, 0.5, 1.0]),
            st.sampled_from([0, 1, 5, 2000]),
            st.sampled_from([1.0, 0.9, 0.3]),
            st.sampled_from([0.0, 0.2]),
        ),
        min_size=1,
        max_size=4,
    ),
    masked=st.booleans(),
)
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_sample(
    seed: int,
    vocab: int,
    dtype: torch.dtype,
    rows: list[tuple[float, int, float, float]],
    masked: bool,
) -> None:
    """bf16 logits have many ties, which filters keep and the argmax settles by id."""
    draw = torch.Generator().manual_seed(seed)
    # A row longer than the vocabulary, as a gathered head leaves it.
    logits = (torch.randn(len(rows), vocab + 3, generator=draw) * 3).to(dtype)[:, :vocab]
    temperature, top_k, top_p, min_p = (torch.tensor(column) for column in zip(*rows, strict=True))
    allowed = None
    if masked:
        words = -(-vocab // 32)
        allowed = torch.randint(-(2**31), 2**31, (len(rows), words), generator=draw).int()
        allowed[:, 0] |= 1
    draws = Draws(
        temperature,
        top_k.int(),
        top_p,
        min_p,
        keys(len(rows), seed),
        allowed,
        bool((temperature > 0).any()),
        True,
    )
    ours = sampling.sample(logits, draws)
    assert torch.equal(ours, reference.sample(logits, draws))
    for row in range(len(rows)):
        one = slice(row, row + 1)
        alone = Draws(
            temperature[one],
            top_k[one].int(),
            top_p[one],
            min_p[one],
            draws.keys[one],
            None if allowed is None else allowed[one],
            draws.drawn,
            True,
        )
        assert sampling.sample(logits[one], alone).item() == ours[row]


def test_penalise() -> None:
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 1500, generator=draw).bfloat16()
    counts = torch.randint(0, 3, (5, 1500), generator=draw).int()
    counts += torch.randint(0, 2, (5, 1500), generator=draw).int() * PROMPT
    rest = (
        torch.tensor([4, 0, 2]),
        torch.tensor([1.0, 1.5, 0.5]),
        torch.tensor([0.0, 0.3, -1.0]),
        torch.tensor([0.0, 2.0, 0.1]),
    )
    ours = sampling.penalise(logits, counts, *rest)
    torch.testing.assert_close(ours, reference.penalise(logits, counts, *rest))
    assert torch.equal(ours[0], logits[0].float())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_broken_row_gets_a_token_all_the_same() -> None:
    logits = torch.zeros(4, 50)
    logits[0], logits[1, 7], logits[2], logits[3, 9] = torch.nan, torch.nan, -torch.inf, torch.inf
    for temperature in (0.0, 1.0):
        for filtered in (False, True):
            column = torch.full((4,), temperature)
            draws = Draws(
                column, torch.full((4,), 5).int(), column * 0 + 0.9, column * 0, keys(4), None,
                temperature > 0, filtered,
            )  # fmt: skip
            tokens = sampling.sample(logits, draws)
            assert ((tokens >= 0) & (tokens < 50)).all()
            assert tokens[1] != 7
            assert tokens[3] == 9, "infinitely likely"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_sampler_draws_alike_with_both() -> None:
    """Rows of every kind in one batch, through the engine's own sampler."""
    hows: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.7, "top_p": 0.6, "seed": 1},
        {"temperature": 1.3, "top_k": 5, "seed": 2, "logit_bias": {3: 4.0}},
        {"temperature": 0.9, "min_p": 0.2, "repetition_penalty": 1.5, "seed": 3},
        {"temperature": 0.0, "frequency_penalty": 0.7, "min_tokens": 3},
        {"temperature": 1.0, "top_k": 2**31, "presence_penalty": -1.0, "seed": 5},
        {"temperature": 1.0, "seed": 6},
    ]
    shapes = Shapes(torch.float32, 4, 2, 16)
    samplers = []
    for kernels in ("reference", "triton"):
        made = Sampler(8, (1,), choose(kernels, torch.device("cpu"), shapes), torch.clone)
        for slot, how in enumerate(hows):
            made.join(Join(slot, Sampling(max_tokens=9, **how), 0, 4, [5, 6, 7, 7]))
        samplers.append(made)
    draw = torch.Generator().manual_seed(0)
    slots = np.array([0, 1, 2, 3, 4, 5, 6])
    for step in range(4):
        logits = torch.randn(7, 300, generator=draw) * 2
        order = slots[: 7 - step][::-1].copy()
        tokens = [made(logits[order], order, np.full(7 - step, 4 + step)) for made in samplers]
        assert torch.equal(*tokens)
