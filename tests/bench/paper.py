"""gpt-oss-120b's experts on 8, 72 and 512 GPUs, computed: ``python -m tests.bench.paper``.

Nothing here was measured by us. R ranks, E experts, k of them per token, D hidden size, T tokens of
every rank in a step. Routing is uniform and tokens are independent of each other. Prints the tables
of docs/expert-parallel.md.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from kernels.roofline import GPT_OSS_120B as MODEL
from kernels.roofline import Ceilings, Cost, moe_cost, touched
from tests.bench import row, table

RANKS = (8, 72, 512)
TOKENS = (8, 64, 256, 1024)


@dataclass(frozen=True, slots=True)
class Machine:
    """``domain`` GPUs are joined by NVLink; others are reached over InfiniBand. Rates in bytes/s of
    one GPU and one direction, ``floor`` in seconds of an exchange of next to nothing."""

    name: str
    ceilings: Ceilings
    ranks: int
    domain: int
    near: float
    floor: float
    far: float = 43e9


H100, B200 = Ceilings(3.35e12, 989e12), Ceilings(8e12, 2.25e15)
MACHINES = (
    Machine("8 H100, NVLink", H100, 8, 8, 153e9, 11e-6),
    Machine("9 x 8 H100, InfiniBand", H100, 72, 8, 153e9, 11e-6),
    Machine("64 x 8 H100, InfiniBand", H100, 512, 8, 153e9, 11e-6),
    Machine("8 B200, NVLink", B200, 8, 8, 726e9, 17e-6),
    Machine("72 B200, one NVLink domain", B200, 72, 72, 726e9, 17e-6),
    Machine("8 x 64 B200, InfiniBand", B200, 512, 64, 726e9, 17e-6),
)


def held(ranks: int) -> list[int]:
    """Slots of every rank: contiguous experts, or one each where there are more ranks."""
    size, rest = divmod(max(MODEL.experts, ranks), ranks)
    return [size + (rank < rest) for rank in range(ranks)]


def distinct(ranks: int) -> float:
    """Ranks that hold any of a token's experts; whole copies of experts share their tokens."""
    if ranks > MODEL.experts:
        return float(MODEL.k)
    every = math.comb(MODEL.experts, MODEL.k)
    return sum(1 - math.comb(MODEL.experts - own, MODEL.k) / every for own in held(ranks))


@dataclass(frozen=True, slots=True)
class Row:
    """Bytes that a token sends in a layer."""

    out: float  # dispatch
    back: float  # combine


ROW = Row(2.0 * MODEL.hidden + 8 * MODEL.k, 2.0 * MODEL.hidden)  # bf16; a slot and a weight


def elsewhere(ranks: int) -> float:
    """Rows that leave a token's rank."""
    return distinct(ranks) * (ranks - 1) / ranks


def exchange_seconds(machine: Machine, row: float, tokens: int) -> float:
    """Of one verb, exact: what goes over NVLink and what over InfiniBand, at once."""
    each = distinct(machine.ranks) / machine.ranks * tokens * row
    near, far = machine.domain - 1, machine.ranks - machine.domain
    return machine.floor + each * max(near / machine.near, far / machine.far)


def experts_cost(ranks: int, tokens: int) -> Cost:
    """Of the mean rank in a layer."""
    slots = max(MODEL.experts, ranks)
    hit = touched(tokens * ranks, slots, MODEL.k) / ranks
    return Cost(hit * MODEL.expert_bytes, moe_cost(MODEL, tokens).flops)


def compute_bound(ceilings: Ceilings, ranks: int) -> float:
    """Tokens of every rank from which the experts' products take longer than their weights."""
    pairs = MODEL.expert_bytes / ceilings.bandwidth * ceilings.flops
    pairs /= 6 * MODEL.hidden**2  # of an expert
    return pairs * max(MODEL.experts, ranks) / (ranks * MODEL.k)


def imbalance(ranks: int, tokens: int) -> float:
    """Expected pairs of the busiest rank over the mean's: E[max] = sum over x of 1 - P(all <= x),
    with the ranks' pairs taken as independent binomials."""
    pairs = MODEL.k * ranks * tokens
    slots = sum(held(ranks))
    mean = pairs / ranks
    x = np.arange(min(pairs, int(4 * mean + 60)) + 1)
    all_below = np.ones(len(x))
    factorials = np.cumsum(np.log(np.maximum(np.arange(pairs + 1), 1)))
    for own, count in Counter(held(ranks)).items():
        p = own / slots
        log = factorials[-1] - factorials[x] - factorials[pairs - x]
        log += x * math.log(p) + (pairs - x) * math.log1p(-p)
        all_below *= np.minimum(np.exp(log).cumsum(), 1) ** count
    return float((1 - all_below).sum() / mean)


def report() -> Iterator[str]:
    """Markdown."""
    rows = []
    for ranks in RANKS:
        own = sorted({*held(ranks)})
        left = elsewhere(ranks)
        exact, fixed = (n * (ROW.out + ROW.back) / 1e3 for n in (left, ranks - 1))
        rows.append(
            row(
                ranks,
                " or ".join(map(str, own)),
                f"{own[-1] * MODEL.layers * MODEL.expert_bytes / 1e9:.2f}",
                f"{distinct(ranks):.2f}",
                f"{left:.2f}",
                f"{left * ROW.out / 1e3:.1f} + {left * ROW.back / 1e3:.1f}",
                f"{fixed:,.0f}",
                f"{fixed / exact:.1f}",
            )
        )
    head = ["GPUs", "experts of a layer", "GB of experts", "distinct ranks", "rows that leave"]
    yield from table([*head, "exact, kB", "fixed shapes, kB", "ratio"], rows)
    yield from table(
        ["busiest rank's pairs over the mean", *(f"T = {n}" for n in TOKENS)],
        (row(f"{n} GPUs", *(f"{imbalance(n, t):.2f}" for t in TOKENS)) for n in RANKS),
    )
    yield from table(
        ["T from which experts are compute bound", *(f"{n} GPUs" for n in (1, *RANKS))],
        (
            row(name, *(f"{compute_bound(ceilings, n):,.0f}" for n in (1, *RANKS)))
            for name, ceilings in (("H100", H100), ("B200", B200))
        ),
    )
    rows = []
    for machine in MACHINES:
        for tokens in TOKENS[:3]:
            cost = experts_cost(machine.ranks, tokens)
            parts = (
                exchange_seconds(machine, ROW.out, tokens),
                cost.seconds(machine.ceilings),
                exchange_seconds(machine, ROW.back, tokens),
            )
            alone = moe_cost(MODEL, tokens).seconds(machine.ceilings)
            cells = [f"{1e6 * seconds:.0f}" for seconds in (*parts, sum(parts), alone)]
            rows.append(row(machine.name, tokens, f"{cost.bytes / 1e6:.0f}", *cells))
    head = ["one layer, us", "T", "MB of weights", "dispatch", "experts", "combine", "sum"]
    yield from table([*head, "all experts on every GPU"], rows)


if __name__ == "__main__":
    print("\n".join(report()))
