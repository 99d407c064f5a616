"""Engines that share experts: one process for each rank, over gloo, driven from a test."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import distributed as dist

from tests.engines import Watch
from tests.fakes import Replaying
from workers.config import ModelSpec
from workers.engine import EngineLoop, follow
from workers.gang import Coordinator, Member
from workers.plans import Follower, Leader
from workers.rank import Rank
from workers.runner import Runner, inputs_bytes
from workers.wire import Load, Logprobs, Output, Request

KEY = b"a key of thirty-two bytes ......"
HOST = "127.0.0.1"
PATIENCE = 300.0  # seconds for anything; every rank must import torch first


@dataclass
class Answer:
    tokens: list[int]
    logprobs: list[Logprobs]
    reason: str | None = None
    detail: str | None = None


@dataclass
class Watched:
    """What a rank has done: pairs that its experts computed, what its router chose
    [layers][experts], and, of rank 0, what it has counted of that."""

    computed: int
    chosen: list[list[int]]
    counted: list[list[int]]


class Gang:
    """``engines`` of ``ranks`` each, a context manager. ``specs`` by engine override ``spec``;
    ``replaying``: on devices that have graphs."""

    def __init__(
        self,
        directory: Path,
        engines: int,
        ranks: int,
        deadline: float = 60.0,
        specs: dict[int, dict[str, Any]] | None = None,
        replaying: bool = False,
        **spec: Any,
    ) -> None:
        defaults: dict[str, Any] = {
            "model": str(directory),
            "device": "cpu",
            "dtype": "float32",
            "kv_cache_memory": 4 << 20,
            "tensor_parallel_size": ranks,
            "data_parallel_size": engines,
            "enable_expert_parallel": True,
        }
        self._store = dist.TCPStore(HOST, 0, None, is_master=True, wait_for_workers=False)
        self.answers: dict[str, Answer] = defaultdict(lambda: Answer([], []))
        self.loads: dict[int, Load] = {}
        self.ends: dict[tuple[int, int], tuple[float, str]] = {}  # when and how a rank has ended
        self.watched: dict[tuple[int, int], Watched] = {}  # of those that ended
        self._pipes: dict[tuple[int, int], Connection] = {}
        self.processes: dict[tuple[int, int], Any] = {}
        context = mp.get_context("spawn")
        for engine in range(engines):
            own = ModelSpec(**(defaults | spec | (specs or {}).get(engine, {})))
            for rank in range(ranks):
                ours, theirs = context.Pipe()
                how = _How(own, engine, rank, deadline, replaying)
                process = context.Process(target=_main, args=(how, self._store.port, theirs))
                process.start()
                theirs.close()
                self._pipes[engine, rank], self.processes[engine, rank] = ours, process

    def __enter__(self) -> Gang:
        return self

    def __exit__(self, *exc: object) -> None:
        for process in self.processes.values():
            process.kill()
            process.join()
        for pipe in self._pipes.values():
            pipe.close()

    def submit(self, engine: int, requests: Iterable[Request]) -> None:
        for request in requests:
            self._pipes[engine, 0].send(request)

    def finish(self, requests: Iterable[Request]) -> None:
        """Wait until all have ended."""
        ids = [request.id for request in requests]
        self.until(lambda: all(self.answers[id].reason for id in ids))

    def until(self, ready: Callable[[], bool], lost: bool = False) -> None:
        """``lost``: ranks may end meanwhile."""
        end = time.monotonic() + PATIENCE
        while not ready():
            left = end - time.monotonic()
            assert left > 0, f"not in time: {self.ends}"
            assert lost or not self.ends, self.ends
            for pipe in wait([p for p in self._pipes.values() if not p.closed], left):
                assert isinstance(pipe, Connection)
                self._take(pipe)

    def _take(self, pipe: Connection) -> None:
        who = next(rank for rank, each in self._pipes.items() if each is pipe)
        try:
            message = pipe.recv()
        except (EOFError, OSError):
            pipe.close()
            self.ends.setdefault(who, (time.monotonic(), "killed"))
            return
        if isinstance(message, str):
            self.ends[who] = (time.monotonic(), message)
            return
        if isinstance(message, Watched):
            self.watched[who] = message
            return
        outputs, load = message
        self.loads[who[0]] = load or self.loads.get(who[0], Load())
        for output in outputs:
            answer = self.answers[output.id]
            if output.tokens:
                assert output.offset == len(answer.tokens), "a gap or a repeat"
            answer.tokens += output.tokens
            answer.logprobs += output.logprobs or ()
            answer.reason, answer.detail = output.reason, output.detail

    def stop(self) -> None:
        """Shut all engines down; wait until every rank has ended."""
        for (_, rank), pipe in self._pipes.items():
            if rank == 0:
                pipe.send(None)
        self.until(lambda: len(self.ends) == len(self.processes), lost=True)

    def signal(self, engine: int, rank: int, number: signal.Signals) -> None:
        os.kill(self.processes[engine, rank].pid, number)


@dataclass
class _How:
    """What a rank's process is told."""

    spec: ModelSpec
    engine: int
    rank: int
    deadline: float
    replaying: bool


def _main(how: _How, port: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore(HOST, port, None, is_master=False)
    try:
        with contextlib.ExitStack() as stack:
            if how.engine == how.rank == 0:
                ranks = how.spec.tensor_parallel_size
                coordinator = Coordinator(
                    HOST, KEY, how.spec.data_parallel_size, ranks, how.deadline
                )
                stack.callback(coordinator.close)
                store.set("coordinator", str(coordinator.port))
            why = _take_part(how, store, pipe)
    except Exception as error:
        traceback.print_exc()
        why = f"{type(error).__name__}: {error}"
    with contextlib.suppress(OSError):  # the test is gone
        pipe.send(why)
    pipe.close()
    os._exit(0)  # a group that was aborted cannot be destroyed


def _take_part(how: _How, store: dist.Store, pipe: Connection) -> str:
    ranks, leader, channel = how.spec.tensor_parallel_size, None, f"leader {how.engine}"
    if how.rank == 0 and ranks > 1:
        leader = Leader(HOST, KEY)
        store.set(channel, str(leader.port))
    rank = Rank(how.spec, how.rank, how.engine)
    address, me = (HOST, int(store.get("coordinator"))), (how.engine, how.rank)
    member = Member(address, KEY, me, rank.facts(), lambda: rank.progress, rank.abort, how.deadline)
    follower = Follower(HOST, int(store.get(channel)), how.rank, KEY) if how.rank else None
    if leader is not None:
        leader.accept(ranks - 1)
    plan = rank.plan(rank.load(store).free_bytes)
    runner = rank.allocate(plan)
    if how.replaying:
        device = Replaying(inputs_bytes(plan.scheduler))
        assert rank._place is not None
        runner = Runner(runner._model, runner._cache, plan.scheduler, rank._place, device)
        runner.capture()
    watch = Watch(runner._model)
    counted: list[list[int]] = []
    if follower is not None:
        try:
            follow(follower, runner, member)
        except ConnectionError as lost:
            why = str(lost)
    else:
        why, counted = _lead(rank, plan, runner, leader, member, pipe)
    pipe.send(Watched(watch.computed, watch.chosen.tolist(), counted))
    return why


def _lead(
    rank: Rank,
    plan: Any,
    runner: Runner,
    leader: Leader | None,
    member: Member,
    pipe: Connection,
) -> tuple[str, list[list[int]]]:
    sending = threading.Lock()

    def publish(outputs: Sequence[Output], load: Load | None) -> None:
        with sending:
            pipe.send((list(outputs), load))

    loop = EngineLoop(rank.scheduler(plan), runner, publish, leader, member)

    def listen() -> None:
        with contextlib.suppress(EOFError):  # the test is gone
            while (request := pipe.recv()) is not None:
                loop.submit(request)
        loop.stop()

    threading.Thread(target=listen, daemon=True).start()
    loop.run()
    replayed = getattr(runner._device, "replayed", 0)
    return f"{loop.failure}; {replayed} steps replayed", loop.experts
