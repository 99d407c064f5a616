"""The next token: filters against a plain oracle, noise against its promise, and statistics."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import reference
from kernels.dispatch import Shapes, choose
from kernels.reference import gumbel, keep
from workers.sampler import Sampler, noise_key
from workers.wire import Join, Sampling

VOCABULARY = 50
OPS = choose("reference", torch.device("cpu"), Shapes(torch.float32, 8, 2, 16))


def sampler(*samplings: dict[str, Any], eos: tuple[int, ...] = ()) -> Sampler:
    """Slot i samples as the i-th says; prompts have 10 tokens, or those given with it."""
    made = Sampler(max(8, len(samplings)), eos, OPS)
    for slot, how in enumerate(samplings):
        choice, known = how.pop("choice", 0), how.pop("known", [])
        made.join(Join(slot, Sampling(**({"max_tokens": 99} | how)), choice, 10, known))
    return made


def draw(made: Sampler, logits: Tensor, positions: list[int] | None = None) -> list[int]:
    slots = np.arange(len(logits), dtype=np.int64)
    at = np.array(positions or [10] * len(logits), np.int64)
    return made(logits.clone(), slots, at).tolist()


def logits(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 2


@given(seed=st.integers(0, 1000), k=st.integers(1, 60), p=st.floats(0.01, 0.999))
def test_filters_keep_what_the_definition_keeps(seed: int, k: int, p: float) -> None:
    scores = logits(1, seed)[0]
    ordered = sorted(range(VOCABULARY), key=lambda token: -float(scores[token]))
    cut = scores.clone()
    keep(cut, k, 1.0, 0.0)
    assert set(torch.isfinite(cut).nonzero().flatten().tolist()) == set(ordered[:k])
    probabilities = scores.double().softmax(0)
    kept, total = [], 0.0
    for token in ordered:
        kept.append(token)
        total += float(probabilities[token])
        if total >= p:
            break
    cut = scores.clone()
    keep(cut, 0, p, 0.0)
    ours = set(torch.isfinite(cut).nonzero().flatten().tolist())
    # Where the sum comes within rounding of p, one token more or less is as right.
    assert ours == set(kept) or (len(ours ^ set(kept)) == 1 and abs(total - p) < 0.02)


def test_ties_are_kept_together() -> None:
    scores = torch.tensor([1.0, 3.0, 3.0, 0.0])
    keep(scores, 1, 1.0, 0.0)
    assert torch.isfinite(scores).tolist() == [False, True, True, False]


@pytest.mark.parametrize("temperature", [1e-5, 9e-6, 1e-37, 1e-38, 1e-40, 1e-44])
def test_the_coldest_take_the_best(temperature: float) -> None:
    """Logits divided by less would be infinite, and all infinite ones alike."""
    rows = logits(8) * 20
    made = sampler(*({"temperature": temperature, "seed": seed} for seed in range(8)))
    assert draw(made, rows) == rows.argmax(-1).tolist()


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
    "how",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 5},
        {"top_p": 0.7},
        {"top_k": 20, "top_p": 0.9},
        {"min_p": 0.1},
    ],
)
def test_frequencies(how: dict[str, Any]) -> None:
    """Chi-square over 4,000 positions; the statistic's 99.9 % quantile is not passed."""
    row, count = logits(1)[0], 4000
    made = sampler({"temperature": 1.0, "seed": 7} | how)
    slots = np.zeros(count, np.int64)
    positions = np.arange(10, 10 + count)
    tokens = made(row.repeat(count, 1), slots, positions).numpy()
    scores = row / how.get("temperature", 1.0)
    keep(scores, how.get("top_k", 0), how.get("top_p", 1.0), how.get("min_p", 0.0))
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
    noise = gumbel(torch.from_numpy(keys.view(np.int32).reshape(-1, 2)), 20_000)
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


def test_min_p_keeps_a_share_of_the_best() -> None:
    scores = torch.tensor([0.5, 0.3, 0.06, 0.04, 0.1]).log()
    keep(scores, 0, 1.0, 0.11)
    assert torch.isfinite(scores).tolist() == [True, True, True, False, True]


def test_bias() -> None:
    rows = logits(2)
    worst = int(rows[1].argmin())
    hows: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.0, "logit_bias": {worst: 100.0, 3: -100.0}},
    ]
    assert draw(sampler(*hows), rows) == [int(rows[0].argmax()), worst]
    beyond = {"temperature": 0.0, "logit_bias": {VOCABULARY + 3: 100.0, -1: 100.0}}
    assert draw(sampler(beyond, dict(beyond)), rows) == rows.argmax(-1).tolist()
    assert draw(sampler({"temperature": 0.0}), rows[1:]) == [int(rows[1].argmax())]


@settings(max_examples=50)
@given(
    known=st.lists(st.integers(0, VOCABULARY - 1), min_size=10, max_size=30),
    repetition=st.sampled_from([1.0, 1.3, 0.7]),
    frequency=st.sampled_from([0.0, 0.8, -0.5]),
    presence=st.sampled_from([0.0, 1.5]),
)
def test_penalties(known: list[int], repetition: float, frequency: float, presence: float) -> None:
    """Token by token against the definition: repetition counts the prompt (10 tokens), the others
    what was generated; beside a row without penalties, and again after a preemption."""
    how: dict[str, Any] = {
        "temperature": 0.0,
        "repetition_penalty": repetition,
        "frequency_penalty": frequency,
        "presence_penalty": presence,
    }
    made = sampler({"temperature": 0.0}, {**how, "known": list(known)})
    for step in range(4):
        rows = logits(2, step)
        expected = rows[1].double().numpy().copy()
        for token in range(VOCABULARY):
            generated = known[10:].count(token)
            if token in known:
                expected[token] *= repetition if expected[token] <= 0 else 1 / repetition
            expected[token] -= frequency * generated + presence * (generated > 0)
        plain, ours = draw(made, rows)
        assert plain == int(rows[0].argmax())
        assert expected[ours] >= expected.max() - 1e-5
        known.append(ours)
        if step == 2:
            made = sampler({"temperature": 0.0}, {**how, "known": list(known)})


def test_what_a_mask_does_not_allow_is_not_chosen() -> None:
    rows = logits(3)
    allowed = torch.zeros(3, 2, dtype=torch.int32)
    allowed[0, 0], allowed[1, 1], allowed[2] = 1 << 7, 1 << 9, -1
    columns = torch.tensor([0.0, 1.0, 0.0])
    draws = reference.Draws(
        columns, torch.zeros(3).int(), columns * 0 + 1, columns * 0, torch.zeros(3, 2).int(),
        allowed, True, False,
    )  # fmt: skip
    assert reference.sample(rows, draws).tolist() == [7, 41, int(rows[2].argmax())]
