"""Engines that share experts, served: a gang of replicas, on one node and on several."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import msgspec
import psutil
import pytest
from torch.distributed import DistStoreError, TCPStore

from parallelism.placement import ExpertLoad, parse
from tests.nodes import ENVIRONMENT, Nodes
from tests.service import DEADLINE, Service
from workers.actor import RankActor, by_node
from workers.config import ModelSpec
from workers.gang import Member
from workers.hub import ABILITIES, BUNDLED
from workers.rank import Rank
from workers.recording import numbered
from workers.rounds import RoundLost

HOST, KEY = "127.0.0.1", b"a key of thirty-two bytes ......"
GANG = ("--data-parallel-size", "2", "--enable-expert-parallel", "--device", "cpu")
LONG = {"prompt": "hello", "max_tokens": 3000, "ignore_eos": True, "stream": True}


def answer(service: Service) -> str:
    body = {"messages": [{"role": "user", "content": "What is 17 + 25?"}]}
    said = httpx.post(f"{service.url}/v1/chat/completions", json=body, timeout=DEADLINE)
    if said.status_code != 200:
        return str(said.status_code)
    return str(said.json()["choices"][0]["message"]["content"])


class Streams:
    """Several at once; what each one's last line was."""

    def __init__(self, service: Service, count: int, **body: Any) -> None:
        self._url, self._body = f"{service.url}/v1/completions", LONG | body
        self.begun = threading.Semaphore(0)
        self._pool = ThreadPoolExecutor(count)
        self._ends = [self._pool.submit(self._stream) for _ in range(count)]

    def _stream(self) -> str:
        with httpx.stream("POST", self._url, json=self._body, timeout=DEADLINE) as answer:
            lines = answer.iter_lines()
            last = next(lines)
            self.begun.release()
            for line in lines:
                last = line or last
        return last

    def ends(self) -> list[str]:
        return [end.result(2 * DEADLINE) for end in self._ends]


def calls(service: Service) -> int:
    """(token, expert) pairs in the files of its two engines."""
    folder = service._log.parent
    files = [folder / "load.json", folder / "load.1.json"]
    assert {*folder.glob("load*.json")} == {*files}
    return sum(sum(map(sum, parse(ExpertLoad, file.read_bytes()).calls)) for file in files)


def running(service: Service) -> list[int]:
    """Requests that each engine works on."""
    return [engine["load"]["running"] for engine in service.status()["engines"]]


@pytest.fixture(scope="module")
def gang(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("gang")
    service = Service(folder, *GANG, "--expert-load", str(folder / "load.json"))
    try:
        service.wait_until_ready()
        yield service
    finally:
        service.stop()


def test_requests_go_to_all_engines_and_tokens_to_all_ranks(gang: Service) -> None:
    assert gang.said().count("rank 0: pid") == 2
    assert ABILITIES in " ".join(gang.said().split())
    assert [engine["engine"][3] for engine in gang.status()["engines"]] == [0, 1]
    assert answer(gang) == "42"
    gang.until(lambda: running(gang) == [0, 0])
    first = Streams(gang, 1, max_tokens=1000)
    gang.until(lambda: sum(running(gang)) == 1)
    second = Streams(gang, 1, max_tokens=1000)
    gang.until(lambda: running(gang) == [1, 1])
    assert answer(gang) == "42"
    assert first.ends() == second.ends() == ["data: [DONE]"]
    for engine in gang.status()["engines"]:
        replica = engine["engine"][2]
        for rank in "01":
            calls = gang.metric("moeray_expert_calls_total", replica=replica, rank=rank)
            assert calls > 1000


@pytest.mark.parametrize("engine", [0, 1])
def test_a_lost_engine_ends_all_streams_and_the_gang_comes_back(gang: Service, engine: int) -> None:
    before = gang.ranks()
    streams = Streams(gang, 4)
    for _ in range(4):
        assert streams.begun.acquire(timeout=DEADLINE)
    os.kill(before[engine], signal.SIGKILL)
    for end in streams.ends():
        error = msgspec.json.decode(end.removeprefix("data: "))["error"]
        assert error["code"] == "unavailable", end
    gang.until(lambda: len({*gang.ranks()} - {*before}) == 2)
    gang.until(lambda: answer(gang) == "42")
    gang.until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in before))


def test_an_idle_engine_stays_until_the_others_have_drained(gang: Service, tmp_path: Path) -> None:
    """It holds half of the experts."""
    before = calls(gang)
    streams = Streams(gang, 1, max_tokens=1000)
    assert streams.begun.acquire(timeout=DEADLINE)
    assert gang.stop() == 0, gang.said()
    assert streams.ends() == ["data: [DONE]"]
    assert calls(gang) - before >= 1000 * 4 * 2, "4 layers, 2 experts for each token"


@pytest.mark.parametrize("loss", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_engines_of_a_gang_are_on_several_nodes(loss: bool, tmp_path: Path) -> None:
    """Each node has room for one engine of two ranks, and one node is to spare, for one's loss."""
    with Nodes(2 + loss, free=0.25) as nodes:
        service = Service(tmp_path, *GANG, "-tp", "2", "--address", nodes.address, **ENVIRONMENT)
        try:
            service.wait_until_ready()
            before = service.ranks()
            where = [psutil.Process(pid).ppid() for pid in before]
            assert len(where) == 4
            assert where[0] == where[1] != where[2] == where[3], "an engine is on one node"
            assert {*where} <= {*nodes.raylets}
            assert answer(service) == "42"
            if not loss:
                return
            seen = [each.info for each in psutil.process_iter(["cmdline", "ppid"])]
            (ingress,) = [
                each["ppid"]
                for each in seen
                if (each["cmdline"] or [""])[0] == "ray::ServeReplica:moeray:ingress"
                and each["ppid"] in nodes.raylets
            ]
            others = nodes.raylets[1:]
            lost = next((each for each in others if each in where and each != ingress), None)
            if lost is None:  # the engines are on the head and beside the ingress
                lost = next(each for each in others if each in where)
            nodes.kill(lost)
            # Ray takes half a minute to call a node dead.
            service.until(lambda: len({*service.ranks()} - {*before}) == 4, 3 * DEADLINE)
            service.until(lambda: answer(service) == "42")
            where = [psutil.Process(pid).ppid() for pid in service.ranks()]
            assert {*where} <= {*nodes.raylets} - {lost}
        finally:
            assert service.stop() == 0, service.said()


def test_who_comes_late_is_not_held_up_by_the_load_that_waits_for_it() -> None:
    facts = {"weights": "of another model"}

    def begun(rank: RankActor) -> None:
        while not hasattr(rank, "_core"):
            time.sleep(0.05)

    async def meet() -> None:
        spec = ModelSpec(
            model=str(BUNDLED), data_parallel_size=2, enable_expert_parallel=True, device="cpu"
        )
        first = RankActor(spec, 0, 0, KEY, 1)
        meeting, plans = await first.meet(HOST), await first.lead(HOST)
        load = asyncio.create_task(first.load(meeting, plans))
        await asyncio.to_thread(begun, first)
        async with asyncio.timeout(DEADLINE):
            where = await first.meet(HOST)
        address = (where.host, where.rounds)
        with pytest.raises(RoundLost, match="differs"):
            await asyncio.to_thread(Member, address, KEY, (1, 0), facts)
        with pytest.raises(RoundLost, match="weights is of another model"):
            await load
        await first.stop()

    asyncio.run(meet())


def test_a_rank_tells_how_much_it_has_loaded() -> None:
    async def load() -> tuple[tuple[int, int], int]:
        rank = RankActor(ModelSpec(model=str(BUNDLED), device="cpu"), 0, 0, KEY, 1)
        assert await rank.loaded() == (0, 0)
        report = await rank.load(await rank.meet(HOST), await rank.lead(HOST))
        return await rank.loaded(), report.weight_bytes

    (done, size), held = asyncio.run(load())
    assert 0 < held // 4 < done == size <= (BUNDLED / "model.safetensors").stat().st_size


def test_a_rank_that_waits_for_a_frozen_one_can_be_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.rank.SLICE", timedelta(seconds=0.1))
    rank = Rank(
        ModelSpec(
            model=str(BUNDLED), data_parallel_size=2, enable_expert_parallel=True, device="cpu"
        )
    )
    rank._store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    timer = threading.Timer(1.0, rank.abort)
    timer.start()
    with pytest.raises(DistStoreError):
        rank._share("free", 1)
    timer.join(DEADLINE)


def test_ranks_are_counted_node_by_node_from_the_first_bundles() -> None:
    assert by_node({0: "b", 1: "a", 2: "b", 3: "c", 4: "a"}) == [0, 2, 1, 4, 3]
    assert by_node({0: "x"}) == [0]


def test_every_replica_counts_into_a_file_of_its_own() -> None:
    assert [numbered("/a/load.json", n) for n in range(3)] == [
        "/a/load.json",
        "/a/load.1.json",
        "/a/load.2.json",
    ]
    assert numbered("", 2) == ""
