"""Engines that share experts, in real processes over gloo: steps, bytes and where the time goes.

Steps are those of ``Rank`` and ``Runner``; every rank plans for itself, alike, and the agreement on
a round is timed apart. What is watched is watched from outside, by a Group and an Exchange in the
places of theirs. All processes of a machine read one monotonic clock, so a rank's wait is the
time from its own arrival at a collective to that of the last rank.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch import distributed as dist

from parallelism import exchange, placement
from parallelism.exchange import Exchange, Routed, Sent
from parallelism.experts import Slots
from parallelism.group import Group
from tests.bench import row, table
from tests.bench.load import prompt
from tests.bench.models import SMALL, build
from workers.config import ModelSpec
from workers.gang import Coordinator, Member
from workers.rank import Rank
from workers.recording import nothing
from workers.wire import Request, Round, Sampling

# Half the layers, and few words: their product is none of the experts'.
MODEL = replace(SMALL, layers=4, vocabulary=2048)
HOST, KEY = "127.0.0.1", b"only this machine's own processes"
PATIENCE = 300.0  # seconds for anything
CONTEXT = 8  # tokens of a prompt that is then decoded
EXACT, FIXED = 0, 1 << 20  # for STATIC: no step, or every step, has fixed shapes
ROUNDS = 200
STRENGTH = 1.0  # of preferences; logits have a standard deviation of 0.3


@dataclass(frozen=True)
class Grid:
    """``engines`` of ``ranks`` processes each, of one thread each."""

    engines: int
    ranks: int
    expert_parallel: bool = True

    @property
    def name(self) -> str:
        if self.engines == self.ranks == 1:
            return "one process"
        how = "EP" if self.expert_parallel else "TP only"
        return f"{self.engines}x{self.ranks} {how}"


ONE, TENSOR, PAIR, SQUARE = Grid(1, 1), Grid(1, 2, False), Grid(2, 1), Grid(2, 2)
GRIDS = (ONE, TENSOR, Grid(1, 2), PAIR, SQUARE)


@dataclass(frozen=True)
class Work:
    """Steps of all engines together: ``sequences`` with one token each, or so many whole prompts
    of ``prompt`` tokens. ``static`` takes the place of STATIC."""

    sequences: int
    prompt: int = 0
    steps: int = 12
    static: int = exchange.STATIC

    @property
    def tokens(self) -> int:
        return self.sequences * max(1, self.prompt)

    @property
    def name(self) -> str:
        return f"{'prefill' if self.prompt else 'decode'} {self.tokens}"


DECODE = (Work(2), Work(32), Work(128))
PREFILL = Work(2, 256, 6)


@dataclass(frozen=True, slots=True)
class Event:
    """One collective as a rank saw it. Times in seconds on the machine's monotonic clock."""

    verb: str  # of the exchange; empty outside
    everyone: bool  # all engines', else the engine's
    begin: float
    end: float
    sent: int  # bytes to other ranks


class WatchedGroup(Group):
    """Notes every collective. ``verb`` is set by the exchange."""

    def __init__(self, *where: Any) -> None:
        super().__init__(*where)
        self.verb = ""
        self.events: list[Event] = []

    def _note(self, everyone: bool, sent: int, run: Callable[[], Any]) -> Any:
        begin = time.monotonic()
        result = run()
        self.events.append(Event(self.verb, everyone, begin, time.monotonic(), sent))
        return result

    def spread(self, x: Tensor) -> Tensor:
        others = self.size * self._engines - 1
        given: Tensor = self._note(
            True, others * x.nbytes, lambda: super(WatchedGroup, self).spread(x)
        )
        return given

    def swap(
        self, x: Tensor, received: Sequence[int] | None = None, sent: Sequence[int] | None = None
    ) -> Tensor:
        ranks = self.size * self._engines
        own = len(x) // ranks if sent is None else sent[self._engine * self.size + self.rank]
        others = (len(x) - own) * (x.nbytes // max(1, len(x)))
        given: Tensor = self._note(
            True, others, lambda: super(WatchedGroup, self).swap(x, received, sent)
        )
        return given

    def all_gather(self, x: Tensor) -> Tensor:
        others = (self.size - 1) * x.nbytes
        given: Tensor = self._note(False, others, lambda: super(WatchedGroup, self).all_gather(x))
        return given

    def all_reduce(self, x: Tensor) -> Tensor:
        """Of two ranks, each sends all of it, and so it does where sums are made in order."""
        if self.size == 1:
            return x
        others = (self.size - 1) * x.nbytes
        given: Tensor = self._note(False, others, lambda: super(WatchedGroup, self).all_reduce(x))
        return given

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        if self.size == 1:
            return x
        others = (self.size - 1) * x.nbytes if self.rank == source else 0
        given: Tensor = self._note(
            False, others, lambda: super(WatchedGroup, self).broadcast(x, source)
        )
        return given


@dataclass(slots=True)
class Layer:
    """Of one layer's exchange: when both verbs began and ended, and rows that must travel."""

    times: list[float]  # dispatch begins, ends, combine begins, ends
    rows: int = 0  # (token, other rank that holds any of its experts) of this rank's share


class WatchedExchange(Exchange):
    """Notes both verbs; what dispatch was given is counted when nobody looks at the clock."""

    def __init__(self, layout: Any, group: Group) -> None:
        super().__init__(layout, group)
        self.layers: list[Layer] = []
        self._given: list[tuple[Slots, Tensor]] = []

    def dispatch(
        self, where: Slots, h: Tensor, slots: Tensor, weights: Tensor
    ) -> tuple[Sent, Routed]:
        assert isinstance(self._group, WatchedGroup)
        self._given.append((where, slots))
        self._group.verb, begin = "dispatch", time.monotonic()
        result = super().dispatch(where, h, slots, weights)
        self.layers.append(Layer([begin, time.monotonic()]))
        return result

    def combine(self, sums: Tensor, sent: Sent) -> Tensor:
        assert isinstance(self._group, WatchedGroup)
        self._group.verb, begin = "combine", time.monotonic()
        result = super().combine(sums, sent)
        self.layers[-1].times += [begin, time.monotonic()]
        self._group.verb = ""
        return result

    def take(self) -> list[Layer]:
        """What was noted since the last time."""
        if self._layout.dp > 1:
            for layer, given in zip(self.layers, self._given, strict=True):
                layer.rows = self._needed(*given)
        taken, self.layers, self._given = self.layers, [], []
        return taken

    def _needed(self, where: Slots, slots: Tensor) -> int:
        layout = self._layout
        each = -(-len(slots) // layout.tp)
        mine = slots[layout.rank * each : (layout.rank + 1) * each]
        ranks = [{*row} for row in where.owners(mine).tolist()]
        return sum(len(row - {layout.ep_rank, layout.world}) for row in ranks)


@dataclass(slots=True)
class Step:
    """As one rank saw it."""

    begin: float
    end: float
    cpu: float  # seconds of all its threads
    layers: list[Layer]
    events: list[Event]


@dataclass(slots=True)
class Seen:
    """What a rank has of one Work."""

    steps: list[Step] = field(default_factory=list)
    tokens: dict[str, list[int]] = field(default_factory=dict)
    calls: list[list[int]] = field(default_factory=list)  # (token, expert) pairs [layers][experts]


class Seat:
    """A rank's process."""

    def __init__(self, spec: ModelSpec, at: tuple[int, int], store: Any) -> None:
        self._engines, self._at = spec.data_parallel_size, at
        self._alone = self._engines * spec.tensor_parallel_size == 1
        with (
            mock.patch("workers.rank.Group", WatchedGroup),
            mock.patch("workers.model.Exchange", WatchedExchange),
        ):
            engine, rank = at
            self._rank = Rank(spec, rank, engine)
            plan = self._rank.plan(self._rank.load(None if self._alone else store).free_bytes)
            self._runner = self._rank.allocate(plan)
        self._scheduler = self._rank.scheduler(plan)
        self._round = 0

    def run(self, work: Work) -> Seen:
        """The first steps of the kind are not counted: the same number on every rank."""
        own = work.sequences // self._engines
        exchange.STATIC = work.static
        before = self._calls()
        seen, warm = Seen(), 2
        if work.prompt:
            for number in range(warm + work.steps):
                self._add(work, own, number, 1)
                while self._scheduler.has_work():
                    step = self._step(seen, own * work.prompt, False)
                    if step is not None and number >= warm:
                        seen.steps.append(step)
        else:
            most = 2 * (warm + work.steps) + own * CONTEXT  # more than the prompts' steps
            self._add(work, own, 0, most)
            while len(seen.steps) < warm + work.steps:
                step = self._step(seen, own, True)
                if step is not None:
                    seen.steps.append(step)
            del seen.steps[:warm]
            for id in seen.tokens:
                self._scheduler.abort(id, 0.0)
        self._scheduler.check()
        after = self._calls()
        seen.calls = [
            [b - a for a, b in zip(*both, strict=True)] for both in zip(before, after, strict=True)
        ]
        return seen

    def _calls(self) -> list[list[int]]:
        return self._runner.expert_calls()()[0]

    def _add(self, work: Work, own: int, number: int, tokens: int) -> None:
        """The same prompts in every grid, each sequence of every turn with its own."""
        for at in range(self._at[0] * own, (self._at[0] + 1) * own):
            ids = prompt(work.prompt or CONTEXT, MODEL.vocabulary, 1000 * number + at)
            how = Sampling(max_tokens=tokens, temperature=0.0, ignore_eos=True)
            self._scheduler.add(
                Request(id=f"{number} {at}", model="bench", prompt=ids, sampling=how), 0.0
            )

    def _step(self, seen: Seen, tokens: int, decode: bool) -> Step | None:
        """One more; what it took if it was of the kind."""
        batch = self._scheduler.plan(0.0)
        size = batch.num_tokens
        if self._engines > 1:
            self._round += 1
            batch.round = Round(self._round, (size,) * self._engines)
        group, watched = self._runner._group, self._runner._model.exchange
        assert isinstance(group, WatchedGroup)
        assert isinstance(watched, WatchedExchange)
        if not self._alone:
            dist.barrier()
        cpu, begin = time.process_time(), time.monotonic()
        result = self._runner.collect(self._runner.launch(batch))
        end, cpu = time.monotonic(), time.process_time() - cpu
        events, group.events = group.events, []
        layers = watched.take()
        for output in self._scheduler.commit(batch, result, 0.0):
            seen.tokens.setdefault(output.id, []).extend(output.tokens)
        of_the_kind = size == tokens and (len(batch) == size) is decode
        return Step(begin, end, cpu, layers, events) if of_the_kind else None

    def rounds(self, store: Any, stack: contextlib.ExitStack) -> list[float]:
        """Seconds from an engine's call to the round, where all call at once; only of first ranks.
        Ends the group."""
        if self._at == (0, 0):
            coordinator = Coordinator(HOST, KEY, self._engines, self._runner._group.size)
            stack.callback(coordinator.close)
            store.set("coordinator", str(coordinator.port))
        member = Member((HOST, int(store.get("coordinator"))), KEY, self._at, self._rank.facts())
        stack.callback(member.close)
        times: list[float] = []
        for _ in range(ROUNDS):
            dist.barrier()
            if self._at[1] == 0:
                begin = time.monotonic()
                member.call(1)
                assert member.wait(PATIENCE) is not None
                times.append(time.monotonic() - begin)
        dist.barrier()
        return times


def _main(spec: ModelSpec, at: tuple[int, int], port: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    try:
        store = dist.TCPStore(HOST, port, None, is_master=False)
        seat = Seat(spec, at, store)
        pipe.send("ready")
        with contextlib.ExitStack() as stack:
            while (asked := pipe.recv()) is not None:
                pipe.send(seat.run(asked) if asked != "rounds" else seat.rounds(store, stack))
            if not seat._alone:
                dist.barrier()
        seat._runner._group.leave()
    except EOFError:  # the parent is gone
        pass
    except Exception:
        traceback.print_exc()
        raise SystemExit(1) from None


@dataclass
class Ranks:
    """The processes of a grid; all answers are by rank."""

    grid: Grid
    _pipes: list[Connection]

    def ask(self, what: Work | str) -> list[Any]:
        for pipe in self._pipes:
            pipe.send(what)
        return self._answers()

    def _answers(self) -> list[Any]:
        found = []
        for pipe in self._pipes:
            if not pipe.poll(PATIENCE):
                raise RuntimeError(f"{self.grid.name}: no answer within {PATIENCE:.0f} s")
            found.append(pipe.recv())
        return found


@contextlib.contextmanager
def ranks(grid: Grid, directory: Path, placed: str = "") -> Iterator[Ranks]:
    """A grid's processes, ready; ``placed`` is a file."""
    spec = ModelSpec(
        model=str(directory),
        device="cpu",
        dtype="float32",
        kv_cache_memory=256 << 20,
        max_num_seqs=128,
        max_num_batched_tokens=512,
        max_model_len=4096,
        enable_prefix_caching=False,  # the same prompts come again
        tensor_parallel_size=grid.ranks,
        data_parallel_size=grid.engines,
        enable_expert_parallel=grid.expert_parallel,
        expert_placement=placed,
    )
    store = dist.TCPStore(HOST, 0, None, is_master=True, wait_for_workers=False)
    context, pipes, processes = mp.get_context("spawn"), [], []
    try:
        for at in [(d, r) for d in range(grid.engines) for r in range(grid.ranks)]:
            ours, theirs = context.Pipe()
            process = context.Process(target=_main, args=(spec, at, store.port, theirs))
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        started = Ranks(grid, pipes)
        started._answers()
        yield started
        for pipe in pipes:
            pipe.send(None)
        for process in processes:
            process.join(PATIENCE)
    finally:
        for process in processes:
            process.kill()
            process.join()


# What the records say.


@dataclass(frozen=True, slots=True)
class Share:
    """Seconds of one rank in one step; ``waits`` by verb, those outside the exchange under ''."""

    step: float
    dispatch: float
    compute: float
    combine: float
    waits: dict[str, float]

    @property
    def rest(self) -> float:
        inside = self.dispatch + self.compute + self.combine
        return self.step - inside - sum(self.waits.values())


def shares(grid: Grid, steps: Sequence[Step]) -> list[Share]:
    """Of one step, given as every rank saw it.

    A rank waits from its arrival at a collective until the last rank's, or until it is done, if it
    needs nothing of that one.
    """
    waits: list[dict[str, float]] = [{"dispatch": 0.0, "combine": 0.0, "": 0.0} for _ in steps]
    world = range(len(steps))
    engines = [world[first : first + grid.ranks] for first in world[:: grid.ranks]]
    for everyone, members in [(True, world), *((False, each) for each in engines)]:
        rows = [[e for e in steps[rank].events if e.everyone is everyone] for rank in members]
        for together in zip(*rows, strict=True):
            assert len({event.verb for event in together}) == 1
            last = max(event.begin for event in together)
            for rank, event in zip(members, together, strict=True):
                waits[rank][event.verb] += min(last, event.end) - event.begin
    found = []
    for step, waited in zip(steps, waits, strict=True):
        spans = [
            sum(layer.times[i + 1] - layer.times[i] for layer in step.layers) for i in range(3)
        ]
        found.append(
            Share(
                step.end - step.begin,
                spans[0] - waited["dispatch"],
                spans[1],
                spans[2] - waited["combine"],
                waited,
            )
        )
    return found


@dataclass(frozen=True, slots=True)
class Bytes:
    """To other ranks, of all ranks together, in one layer of a step."""

    dispatch: float
    combine: float
    least: float  # tokens x distinct other ranks x hidden, of either verb


def wire(steps: Sequence[Step], row: int) -> Bytes:
    """Of one step, given as every rank saw it; ``row`` bytes has a token's hidden state."""
    layers = len(steps[0].layers)
    sent = {"dispatch": 0, "combine": 0, "": 0}
    for step in steps:
        for event in step.events:
            sent[event.verb] += event.sent
    rows = sum(layer.rows for step in steps for layer in step.layers)
    return Bytes(sent["dispatch"] / layers, sent["combine"] / layers, rows * row / layers)


@dataclass
class Measured:
    """All repeats of one Work in one grid.

    Other work on the machine only ever makes a step longer, so times are those of each run's
    quickest quarter of steps.
    """

    grid: Grid
    work: Work
    runs: list[list[Seen]] = field(default_factory=list)  # by repeat, then rank

    def _quick(self) -> list[list[tuple[Step, ...]]]:
        """[runs][steps][ranks]."""
        found = []
        for run in self.runs:
            steps = sorted(zip(*(seen.steps for seen in run), strict=True), key=lasted)
            found.append(steps[: max(1, len(steps) // 4)])
        return found

    def milliseconds(self) -> list[float]:
        """By run."""
        return [1e3 * statistics.fmean(map(lasted, steps)) for steps in self._quick()]

    def cpu_milliseconds(self) -> float:
        """Of all ranks together in a step: the median of all."""
        every = [step for run in self.runs for step in zip(*(s.steps for s in run), strict=True)]
        spent: list[float] = [sum(rank.cpu for rank in step) for step in every]
        return 1e3 * statistics.median(spent)

    def shares(self) -> list[Share]:
        """By rank, means over the quick steps of all runs."""
        every = [shares(self.grid, step) for steps in self._quick() for step in steps]
        return [mean(rank) for rank in zip(*every, strict=True)]

    def wait_shares(self) -> list[float]:
        """Waits in the exchanges over the time of all ranks, in percent, by run."""
        found = []
        for steps in self._quick():
            every = [share for step in steps for share in shares(self.grid, step)]
            waits = sum(share.waits["dispatch"] + share.waits["combine"] for share in every)
            found.append(100 * waits / sum(share.step for share in every))
        return found

    def wire(self, row: int) -> Bytes:
        """The mean over steps of the first run."""
        every = [wire(s, row) for s in zip(*(seen.steps for seen in self.runs[0]), strict=True)]
        parts = zip(*((each.dispatch, each.combine, each.least) for each in every), strict=True)
        return Bytes(*map(statistics.fmean, parts))


def lasted(step: Sequence[Step]) -> float:
    """Seconds from the first rank's beginning to the last one's end."""
    return max(each.end for each in step) - min(each.begin for each in step)


def mean(shares: Sequence[Share]) -> Share:
    waits = {verb: statistics.fmean(s.waits[verb] for s in shares) for verb in shares[0].waits}
    parts = zip(*((s.step, s.dispatch, s.compute, s.combine) for s in shares), strict=True)
    step, dispatch, compute, combine = map(statistics.fmean, parts)
    return Share(step, dispatch, compute, combine, waits)


# A skewed trace.


def skew(directory: Path) -> None:
    """Prefer experts: the n-th favourite of a layer by STRENGTH / sqrt(n), in a drawn order."""
    file = directory / "model.safetensors"
    tensors, draw = load_file(file), torch.Generator().manual_seed(1)
    for name, bias in tensors.items():
        if name.endswith("router.bias"):
            place = torch.randperm(len(bias), generator=draw) + 1
            bias += STRENGTH / place.sqrt()
    save_file(tensors, file, metadata={"format": "pt"})


def load_of(directory: Path, seen: Sequence[Sequence[Seen]]) -> placement.ExpertLoad:
    """What the first ranks of all engines have counted in several Works."""
    total = torch.stack([torch.tensor(rank.calls) for each in seen for rank in each]).sum(0)
    calls = tuple(map(tuple, total.tolist()))
    start = nothing(directory, "bench", len(calls), len(calls[0]))
    return msgspec.structs.replace(start, calls=calls)


def run(ranks: Ranks, measured: dict[tuple[str, Work], Measured], name: str, work: Work) -> None:
    found = measured.setdefault((name, work), Measured(ranks.grid, work))
    found.runs.append(ranks.ask(work))


def between(values: Sequence[float], digits: int = 1) -> str:
    """The median, and the least and the most."""
    middle, *ends = (
        f"{x:.{digits}f}" for x in (statistics.median(values), min(values), max(values))
    )
    return f"{middle} ({' to '.join(ends)})"


def skewed(directory: Path, repeats: int) -> Iterator[str]:
    """Before and after placement, on PAIR."""
    works = (DECODE[-1], PREFILL)
    measured: dict[tuple[str, Work], Measured] = {}
    with ranks(PAIR, directory) as started:
        load = load_of(directory, [started.ask(work) for work in works])
    named = {"contiguous": placement.contiguous(load, 2)}
    named |= {f"balanced, {n} redundant": placement.place(load, 2, n) for n in (0, 1)}
    for _ in range(repeats):
        for name, placed in named.items():
            file = directory / f"{name}.placement.json"
            file.write_bytes(msgspec.json.encode(placed))
            with ranks(PAIR, directory, str(file)) as started:
                for work in works:
                    run(started, measured, name, work)
    yield from table(
        [
            "placement",
            "imbalance of the load",
            "step",
            "ms a step",
            "wait, %",
            "experts, ms, ranks 0 / 1",
            "wait for combine, ms",
            "tokens as with contiguous",
        ],
        [
            row(
                name,
                f"{placement.imbalance(named[name].loads(load)):.3f}",
                work.name,
                between(each.milliseconds()),
                between(each.wait_shares()),
                " / ".join(f"{1e3 * share.compute:.1f}" for share in each.shares()),
                " / ".join(f"{1e3 * share.waits['combine']:.1f}" for share in each.shares()),
                agreement(each, measured["contiguous", work]),
            )
            for (name, work), each in measured.items()
        ],
    )


def agreement(ours: Measured, theirs: Measured) -> str:
    """Tokens that are the same, of all."""
    same = total = 0
    for mine, other in zip(ours.runs[0], theirs.runs[0], strict=True):
        for id, tokens in mine.tokens.items():
            same += sum(a == b for a, b in zip(tokens, other.tokens[id], strict=True))
            total += len(tokens)
    return f"{same} of {total}"


def report(folder: Path, repeats: int = 3) -> Iterator[str]:
    """Markdown. Takes minutes."""
    began, before = time.monotonic(), os.getloadavg()[0]
    directory = build(MODEL, folder / "even")
    measured: dict[tuple[str, Work], Measured] = {}
    other = [replace(work, static=EXACT) for work in DECODE] + [replace(PREFILL, static=FIXED)]
    agreed: dict[str, list[float]] = {}
    for turn in range(repeats):
        for grid in GRIDS:
            with ranks(grid, directory) as started:
                for work in (*DECODE, PREFILL, *(other if grid.engines > 1 else ())):
                    run(started, measured, grid.name, work)
                if grid.engines > 1 and turn == 0:
                    agreed[grid.name] = [t for times in started.ask("rounds") for t in times]
    works = (*DECODE, PREFILL)
    yield "Steps: ms (least to most run); tokens/s; CPU ms of all ranks."
    yield ""
    rows = []
    for grid in GRIDS:
        cells = []
        for work in works:
            each = measured[grid.name, work]
            rate = 1e3 * work.tokens / statistics.median(each.milliseconds())
            cpu = each.cpu_milliseconds()
            cells.append(f"{between(each.milliseconds())}; {rate:.0f}; {cpu:.0f}")
        rows.append(row(grid.name, *cells))
    yield from table(["", *(work.name for work in works)], rows)
    yield "Agreeing on a round, all engines at once, us (median, least to most): " + "; ".join(
        f"{name} {between([1e6 * t for t in times], 0)}" for name, times in agreed.items()
    )
    yield ""
    yield "Bytes to other ranks in a layer of a step, of all ranks, and ms a step."
    yield ""
    rows = []
    for grid in (PAIR, SQUARE):
        for work, twin in zip(works, other, strict=True):
            for each in (measured[grid.name, work], measured[grid.name, twin]):
                sent = each.wire(MODEL.hidden * 4)
                fixed = each.work.static >= work.tokens // grid.engines
                rows.append(
                    row(
                        grid.name,
                        work.name,
                        "fixed shapes" if fixed else "exact",
                        f"{sent.dispatch:,.0f}",
                        f"{sent.combine:,.0f}",
                        f"{sent.least:,.0f}",
                        f"{sent.dispatch / sent.least:.2f}, {sent.combine / sent.least:.2f}",
                        between(each.milliseconds()),
                    )
                )
    head = ["", "step", "way", "dispatch", "combine", "least, each", "ratios", "ms a step"]
    yield from table(head, rows)
    yield "Where the time of a step goes, ms by rank."
    yield ""
    rows = []
    for grid in (TENSOR, PAIR, SQUARE):
        for work in (DECODE[-1], PREFILL):
            for at, share in enumerate(measured[grid.name, work].shares()):
                parts = (share.dispatch, share.compute, share.combine, *share.waits.values())
                cells = [f"{1e3 * seconds:.1f}" for seconds in (*parts, share.rest, share.step)]
                rows.append(row(grid.name, work.name, at, *cells))
    head = ["", "step", "rank", "dispatch", "experts", "combine", "wait in dispatch"]
    yield from table([*head, "in combine", "elsewhere", "rest", "step"], rows)
    leaning = build(MODEL, folder / "skewed")
    skew(leaning)
    yield f"Skewed routing, {PAIR.name}."
    yield ""
    yield from skewed(leaning, repeats)
    yield (
        f"Load average {before:.1f} before, {os.getloadavg()[0]:.1f} after; "
        f"{time.monotonic() - began:.0f} s."
    )
