"""Which steps engines take together: rounds, and who is missing. Pure; ``now`` is an argument.

Engines that share experts need each other in every step that has a token. An engine with a batch
calls a round; the round is made when every engine has said how many tokens it brings. "None" stands
until it is taken back by a call: an engine at rest is part of every round that the others make, and
an idle group makes none. Every rank tells now and then how far it is, so that who holds the others
up has a name. One that is lost ends the group: its experts are gone, and the other engines' steps
with them. An engine that is told to stop helps the others until all have been told.
"""

from __future__ import annotations

import msgspec

from workers.wire import Round

Rank = tuple[int, int]  # engine, rank in it


class RoundLost(ConnectionError):
    """The engines cannot go on together; the message says because of which rank."""


class Hello(msgspec.Struct, tag=True, array_like=True):
    """A rank comes in. ``facts`` must be the same for all."""

    engine: int
    rank: int
    facts: dict[str, str]


class Beat(msgspec.Struct, tag=True, array_like=True):
    """A sign of life; from a rank, with how far it is in what all do together."""

    progress: int = 0


class Call(msgspec.Struct, tag=True, array_like=True):
    """An engine brings so many tokens to the next round; 0: to all of them, until it calls."""

    tokens: int


class Retire(msgspec.Struct, tag=True, array_like=True):
    """An engine brings nothing any more. It takes part until all say so."""


class Leave(msgspec.Struct, tag=True, array_like=True):
    """A rank cannot go on."""

    why: str


class Met(msgspec.Struct, tag=True, array_like=True):
    """All ranks are there."""


class Made(msgspec.Struct, tag=True, array_like=True):
    round: Round


class Ended(msgspec.Struct, tag=True, array_like=True):
    why: str


FromRank = Hello | Beat | Call | Retire | Leave
ToRank = Beat | Met | Made | Ended


def name(rank: Rank) -> str:
    return f"engine {rank[0]}, rank {rank[1]}"


class Rounds:
    """``engines`` of ``ranks`` each. ``deadline``: seconds of a round, and of a rank's silence;
    ``meet``: seconds between the first rank that comes and the last."""

    def __init__(self, engines: int, ranks: int, deadline: float, meet: float) -> None:
        self._everybody = [(engine, rank) for engine in range(engines) for rank in range(ranks)]
        self._deadline, self._meet = deadline, meet
        self._facts: dict[Rank, dict[str, str]] = {}
        self._heard: dict[Rank, tuple[float, int]] = {}  # when, and its progress
        self._first: float | None = None  # when the first one came
        # What each engine brings; None: it has not said since its last round.
        self._said: list[int | None] = [None] * engines
        self._owing: dict[int, float] = {}  # since when an engine of a round has said nothing
        self._retired: set[int] = set()
        self._number = 0

    def meet(self, hello: Hello, now: float) -> str | None:
        """A rank comes in; why it cannot."""
        rank = (hello.engine, hello.rank)
        if rank not in self._everybody:
            return f"{name(rank)} is none of {len(self._said)} engines' ranks"
        if rank in self._facts:
            return f"{name(rank)} came twice"
        for other, facts in self._facts.items():
            if differing := _differences(hello.facts, facts):
                return f"{name(rank)} differs from {name(other)}: {differing}"
        self._facts[rank] = hello.facts
        self._first = now if self._first is None else self._first
        self._heard[rank] = (now, 0)
        return None

    @property
    def missing(self) -> list[Rank]:
        """Ranks that have not come yet."""
        return [rank for rank in self._everybody if rank not in self._facts]

    def say(self, engine: int, tokens: int) -> None:
        """What an engine brings to the next round."""
        self._said[engine] = tokens
        self._owing.pop(engine, None)

    def make(self, now: float) -> Round | None:
        """The next round, if every engine has said what it brings and one brings something."""
        tokens = tuple(said for said in self._said if said is not None)
        if len(tokens) < len(self._said) or not any(tokens):
            return None
        self._number += 1
        for engine, brought in enumerate(tokens):
            if brought:
                self._said[engine] = None
                self._owing[engine] = now
        return Round(self._number, tokens)

    def retire(self, engine: int) -> str | None:
        """An engine was told to stop; why the group must end, if it was the last one."""
        self._retired.add(engine)
        return "all engines were shut down" if len(self._retired) == len(self._said) else None

    def heard(self, rank: Rank, progress: int, now: float) -> None:
        """A rank has given a sign of life."""
        self._heard[rank] = (now, progress)

    def overdue(self, now: float) -> str | None:
        """Why the group must end: who has been silent for too long, or has stayed behind."""
        if self._first is not None and self.missing and now - self._first > self._meet:
            missing = "; ".join(map(name, self.missing))
            return f"{missing} has not come in {now - self._first:.1f} s"
        for rank, (when, _) in self._heard.items():
            if now - when > self._deadline:
                return f"{name(rank)} has been silent for {now - when:.1f} s"
        late = [e for e, since in self._owing.items() if now - since > self._deadline]
        if not late:
            return None
        least = min(progress for _, progress in self._heard.values())
        behind = [name(rank) for rank, (_, at) in self._heard.items() if at == least]
        if len(behind) == len(self._heard):
            behind = [name((engine, 0)) for engine in late]
        over = f"round {self._number} is not over after {self._deadline:.1f} s"
        return f"{over}: {'; '.join(behind)} held it up"


def _differences(ours: dict[str, str], theirs: dict[str, str]) -> str:
    keys = sorted(ours.keys() | theirs.keys())
    return ", ".join(
        f"{key} is {ours.get(key, 'unknown')}, not {theirs.get(key, 'unknown')}"
        for key in keys
        if ours.get(key) != theirs.get(key)
    )
