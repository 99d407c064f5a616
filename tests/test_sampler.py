"""The next token: filters against a plain oracle, noise against its promise, and statistics."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from workers.sampler import Sampler, gumbel, keep_top_k, keep_top_p, noise_key
from workers.wire import Join, Sampling

VOCABULARY = 50


def sampler(*samplings: dict[str, Any], eos: tuple[int, ...] = ()) -> Sampler:
    """Slot i samples as the i-th says; prompts have 10 tokens."""
    made = Sampler(max(8, len(samplings)), eos)
    for slot, how in enumerate(samplings):
        choice = how.pop("choice", 0)
        made.join(Join(slot, Sampling(**({"max_tokens": 99} | how)), choice, 10))
    return made


def draw(made: Sampler, logits: Tensor, positions: list[int] | None = None) -> list[int]:
    slots = np.arange(len(logits), dtype=np.int64)
    at = np.array(positions or [10] * len(logits), np.int64)
    return made(logits.clone(), slots, at).tolist()


def logits(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 2


@settings(deadline=None)
@given(seed=st.integers(0, 1000), k=st.integers(1, 60), p=st.floats(0.01, 0.999))
def test_filters_keep_what_the_definition_keeps(seed: int, k: int, p: float) -> None:
    scores = logits(1, seed)[0]
    ordered = sorted(range(VOCABULARY), key=lambda token: -float(scores[token]))
    cut = scores.clone()
    if k < VOCABULARY:
        keep_top_k(cut, k)
    assert set(torch.isfinite(cut).nonzero().flatten().tolist()) == set(ordered[:k])
    probabilities = scores.double().softmax(0)
    kept, total = [], 0.0
    for token in ordered:
        kept.append(token)
        total += float(probabilities[token])
        if total >= p:
            break
    cut = scores.clone()
    keep_top_p(cut, p)
    ours = set(torch.isfinite(cut).nonzero().flatten().tolist())
    # Where the sum comes within rounding of p, one token more or less is as right.
    assert ours == set(kept) or (len(ours ^ set(kept)) == 1 and abs(total - p) < 0.02)


def test_ties_are_kept_together() -> None:
    scores = torch.tensor([1.0, 3.0, 3.0, 0.0])
    keep_top_k(scores, 1)
    assert torch.isfinite(scores).tolist() == [False, True, True, False]


def test_greedy_and_its_equivalents() -> None:
    rows = logits(4)
    made = sampler(
        {"temperature": 0.0},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 1.0, "top_p": 1e-6},
        {"temperature": 1e-4},
    )
    assert draw(made, rows) == rows.argmax(-1).tolist()


@pytest.mark.parametrize(
    "how", [{}, {"temperature": 0.5}, {"top_k": 5}, {"top_p": 0.7}, {"top_k": 20, "top_p": 0.9}]
)
def test_frequencies(how: dict[str, Any]) -> None:
    """Chi-square over 4,000 positions; the statistic's 99.9 % quantile is not passed."""
    row, count = logits(1)[0], 4000
    made = sampler({"temperature": 1.0, "seed": 7} | how)
    slots = np.zeros(count, np.int64)
    positions = np.arange(10, 10 + count)
    tokens = made(row.repeat(count, 1), slots, positions).numpy()
    scores = row / how.get("temperature", 1.0)
    if "top_k" in how:
        keep_top_k(scores, how["top_k"])
    if "top_p" in how:
        keep_top_p(scores, how["top_p"])
    expected = scores.softmax(0).double().numpy() * count
    observed = np.bincount(tokens, minlength=VOCABULARY)
    assert observed[expected == 0].sum() == 0
    common = expected >= 5
    rare = float(expected[~common].sum())
    statistic = float(((observed - expected)[common] ** 2 / expected[common]).sum())
    if rare >= 1:
        statistic += (float(observed[~common].sum()) - rare) ** 2 / rare
    freedom = int(common.sum())
    # Wilson and Hilferty's approximation of the quantile.
    assert statistic < freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3


@settings(deadline=None)
@given(
    order=st.permutations(range(6)),
    seeds=st.lists(st.integers(-(2**62), 2**62), min_size=6, max_size=6),
)
def test_a_token_depends_on_seed_choice_and_position_alone(
    order: list[int], seeds: list[int]
) -> None:
    rows = logits(6)
    hows = [{"seed": seed, "choice": at % 2} for at, seed in enumerate(seeds)]
    together = draw(sampler(*(dict(how) for how in hows)), rows, [10 + at for at in range(6)])
    shuffled = draw(
        sampler(*(dict(hows[at]) for at in order)), rows[list(order)], [10 + at for at in order]
    )
    assert shuffled == [together[at] for at in order]
    for at in range(6):
        assert draw(sampler(dict(hows[at])), rows[at : at + 1], [10 + at]) == [together[at]]


def test_noise_differs_where_it_should() -> None:
    keys = np.array(
        [
            noise_key(1, 0) + np.uint64(5),
            noise_key(1, 0) + np.uint64(6),
            noise_key(1, 1) + np.uint64(5),
            noise_key(2, 0) + np.uint64(5),
        ],
        np.uint64,
    )
    noise = gumbel(keys, 20_000, torch.device("cpu"))
    assert torch.isfinite(noise).all()
    # Of a Gumbel distribution: mean 0.5772, variance pi^2 / 6.
    assert noise.mean(1).sub(0.5772).abs().max() < 0.04
    assert noise.var(1).sub(1.6449).abs().max() < 0.12
    correlation = torch.corrcoef(noise) - torch.eye(4)
    assert correlation.abs().max() < 0.03


def test_min_tokens_bans_what_would_end_the_answer() -> None:
    rows = torch.full((3, VOCABULARY), -5.0)
    rows[:, 3], rows[:, 4], rows[:, 5] = 9.0, 8.0, 7.0
    hows: list[dict[str, Any]] = [
        {"temperature": 0.0, "min_tokens": 2},
        {"temperature": 0.0, "min_tokens": 2, "stop_token_ids": (4, 999)},
        {"temperature": 0.0, "min_tokens": 2, "ignore_eos": True},
    ]
    made = sampler(*hows, eos=(3,))
    assert draw(made, rows, [11, 11, 11]) == [4, 5, 3]
    assert draw(made, rows, [12, 12, 12]) == [3, 3, 3]
