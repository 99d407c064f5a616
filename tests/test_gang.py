"""Engines that share experts, in real processes, against one process."""

from __future__ import annotations

import hashlib
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from parallelism.layout import Places
from parallelism.placement import ExpertLoad, Placement, contiguous, place
from tests.checkpoints import tiny_gpt_oss
from tests.engines import Engine, greedy, prompts
from tests.gangs import Answer, Gang
from tests.test_parallel import TIGHT, assert_same, requests
from workers.wire import Request

GRIDS = [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1)]
CHUNKS: dict[str, Any] = {"max_num_batched_tokens": 16, "max_num_seqs": 8}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gpt_oss(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Engine:
    return Engine(checkpoint)


@pytest.fixture(scope="module")
def expected(engine: Engine) -> dict[str, list[int]]:
    return engine.generate(requests())


@pytest.fixture(scope="module")
def recorded(engine: Engine, expected: dict[str, list[int]]) -> ExpertLoad:
    calls, _ = engine.runner.expert_calls()()
    return msgspec.structs.replace(engine.rank.nothing(), calls=tuple(map(tuple, calls)))


def written(file: Path, placement: Placement) -> str:
    file.write_bytes(msgspec.json.encode(placement))
    return str(file)


def by_hand(directory: Path, *layers: Places) -> Placement:
    return Placement(
        model="by hand",
        config=hashlib.sha256((directory / "config.json").read_bytes()).hexdigest(),
        experts=8,
        slots=8,
        ranks_per_node=1,
        layers=layers,
    )


def logprobs(id: str, prompt: list[int]) -> Request:
    return greedy(id, prompt, 8, logprobs=5)


def bits(answer: Answer) -> list[tuple[Any, ...]]:
    """Of a token's logits: fp32 log probabilities survive the way through Python unchanged."""
    return [(each.chosen, each.tokens, each.values) for each in answer.logprobs]


def serve(gang: Gang, engines: int, every: Sequence[Request]) -> None:
    """Twelve requests: all but one of them at the last engine, one at the first."""
    gang.submit(engines - 1, every[1:])
    gang.submit(0, every[:1])
    gang.finish(every)


def test_two_engines_give_the_tokens_of_one_process(
    checkpoint: Path, expected: dict[str, list[int]]
) -> None:
    """In pools so small that both preempt, in chunks, with prefixes found again; one idle from the
    start, then going idle, then waking. A token's logits have the same bits in whichever engine and
    company."""
    alone, shared = requests()[1].prompt, [*range(40)]
    with Gang(checkpoint, 2, 1, **(CHUNKS | TIGHT)) as gang:
        first = logprobs("alone", alone)
        gang.submit(1, [first])
        gang.finish([first])
        serve(gang, 2, requests())
        tokens = {request.id: gang.answers[request.id].tokens for request in requests()}
        assert_same(checkpoint, tokens, expected)
        assert gang.loads[1].preemptions > 0
        crowd = [logprobs(f"crowd {at}", alone) for at in range(2)]
        other = [greedy(f"other {i}", p, 12) for i, p in enumerate(prompts(6, longest=60))]
        for at in range(2):
            gang.submit(at, [*other[at::2], crowd[at]])
        gang.finish([*crowd, *other])
        for each in crowd:
            assert gang.answers[each.id].tokens == gang.answers["alone"].tokens
            assert bits(gang.answers[each.id]) == bits(gang.answers["alone"])
        for turn in range(2):
            again = [logprobs(f"again {turn}", shared)]
            gang.submit(0, again)
            gang.finish(again)
        assert gang.loads[0].prefix_hits >= 36
        assert bits(gang.answers["again 0"]) == bits(gang.answers["again 1"])
        load = gang.loads[1]
        computed = load.prompt_tokens + load.generated_tokens
        assert len(load.expert_calls) == 2
        assert min(load.expert_calls) > 0
        assert sum(load.expert_calls) >= 4 * 4 * (computed - load.prefix_hits - len(requests()) - 9)
        gang.stop()
        assert all("the engine was shut down" in why for _, why in gang.ends.values())


def assert_placed(gang: Gang, engines: int, ranks: int) -> None:
    """Every rank computed the pairs that the engines counted for it, and these counted for every
    expert what was chosen."""
    gang.stop()
    counted = [gang.loads[at].expert_calls for at in range(engines)]
    computed = [gang.watched[at, rank].computed for at in range(engines) for rank in range(ranks)]
    assert computed == [sum(by_rank) for by_rank in zip(*counted, strict=True)]
    assert min(computed) > 0
    for at in range(engines):
        assert gang.watched[at, 0].counted == gang.watched[at, 0].chosen


@pytest.mark.parametrize(
    ("engines", "ranks", "redundant"),
    [
        (1, 2, 2),
        (2, 1, 2),
        pytest.param(2, 2, 2, marks=pytest.mark.slow),
        pytest.param(1, 2, 0, marks=pytest.mark.slow),
        pytest.param(2, 1, 0, marks=pytest.mark.slow),
        pytest.param(2, 2, 0, marks=pytest.mark.slow),
    ],
)
def test_a_placement_changes_no_token(
    engines: int,
    ranks: int,
    redundant: int,
    checkpoint: Path,
    expected: dict[str, list[int]],
    recorded: ExpertLoad,
    tmp_path: Path,
) -> None:
    """From a file of the recorded load, with and without redundant experts; engines may have it
    at different places."""
    placement = place(recorded, engines * ranks, redundant)
    assert placement.layers != contiguous(recorded, engines * ranks).layers
    files = [written(tmp_path / f"{at}.json", placement) for at in range(engines)]
    specs = {at: {"expert_placement": file} for at, file in enumerate(files)}
    with Gang(checkpoint, engines, ranks, specs=specs, **(TIGHT | CHUNKS)) as gang:
        serve(gang, engines, requests())
        tokens = {request.id: gang.answers[request.id].tokens for request in requests()}
        assert_same(checkpoint, tokens, expected)
        assert_placed(gang, engines, ranks)


@pytest.mark.slow
@pytest.mark.parametrize("mxfp4", [False, True])
def test_copies_of_experts_on_any_rank_change_no_token(mxfp4: bool, tmp_path: Path) -> None:
    """Another placement in every layer; a rank without experts in the last."""
    directory = tiny_gpt_oss(tmp_path / "model", mxfp4=mxfp4)
    placement = by_hand(
        directory,
        ((1, 3, 7), (0, 2, 4, 5, 6)),
        ((0, 1, 2, 3, 4, 5), (2, 3, 4, 5, 6, 7)),
        ((*range(8),), (*range(8),)),
        ((*range(8),), ()),
    )
    file = written(tmp_path / "placement.json", placement)
    with Gang(directory, 2, 1, expert_placement=file, **CHUNKS) as gang:
        serve(gang, 2, requests())
        tokens = {request.id: gang.answers[request.id].tokens for request in requests()}
        assert_same(directory, tokens, Engine(directory).generate(requests()))
        pair = [logprobs(f"at {at}", requests()[1].prompt) for at in range(2)]
        for at in range(2):
            gang.submit(at, [pair[at]])
        gang.finish(pair)
        assert bits(gang.answers["at 0"]) == bits(gang.answers["at 1"])
        assert_placed(gang, 2, 1)


@pytest.mark.slow
@pytest.mark.parametrize(("engines", "ranks"), GRIDS)
def test_tokens_are_the_same_in_every_grid(
    engines: int, ranks: int, checkpoint: Path, expected: dict[str, list[int]], tmp_path: Path
) -> None:
    """bf16 and MXFP4 experts, calm with large steps, then preempting in chunks."""
    packed = tiny_gpt_oss(tmp_path, mxfp4=True, intermediate_size=160, num_local_experts=6)
    jobs: list[tuple[Path, dict[str, list[int]], dict[str, Any]]] = [
        (checkpoint, expected, TIGHT | CHUNKS),
        (packed, Engine(packed).generate(requests()), {}),
    ]
    for directory, wanted, spec in jobs:
        with Gang(directory, engines, ranks, **spec) as gang:
            serve(gang, engines, requests())
            tokens = {request.id: gang.answers[request.id].tokens for request in requests()}
            assert_same(directory, tokens, wanted)
            companies = [logprobs(f"at {at}", requests()[1].prompt) for at in range(engines)]
            for at, each in enumerate(companies):
                crowd = [greedy(f"c{at} {i}", p, 4 + at) for i, p in enumerate(prompts(2 * at))]
                gang.submit(at, [*crowd, each])
            gang.finish(companies)
            assert len({str(bits(gang.answers[each.id])) for each in companies}) == 1
            gang.stop()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_rank_ends_the_round_everywhere_in_time(
    number: signal.Signals, checkpoint: Path
) -> None:
    """And the others say which one it was."""
    deadline = 10.0
    with Gang(checkpoint, 2, 1, deadline) as gang:
        running = [greedy(f"r{engine}", [1, 2, 3], 400) for engine in range(2)]
        for engine, each in enumerate(running):
            gang.submit(engine, [each])
        gang.until(lambda: all(gang.answers[each.id].tokens for each in running))
        began = time.monotonic()
        gang.signal(1, 0, number)
        gang.until(lambda: (0, 0) in gang.ends, lost=True)
        ended, why = gang.ends[0, 0]
        assert "engine 1, rank 0" in why
        assert ended - began < 3 * deadline
        assert gang.answers["r0"].reason == "error"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("victim", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_whichever_rank_is_lost_has_its_name_said(
    number: signal.Signals, victim: tuple[int, int], checkpoint: Path
) -> None:
    """One engine is idle. A lost coordinator is known by its silence."""
    deadline = 10.0
    with Gang(checkpoint, 2, 2, deadline) as gang:
        running = greedy("r", [1, 2, 3], 400)
        gang.submit(0, [running])
        gang.until(lambda: bool(gang.answers["r"].tokens))
        began = time.monotonic()
        gang.signal(*victim, number)
        gang.until(lambda: {*gang.processes} - {victim} <= {*gang.ends}, lost=True)
        for rank, (ended, why) in gang.ends.items():
            if rank != victim:
                assert f"engine {victim[0]}, rank {victim[1]}" in why
                assert ended - began < 3 * deadline


def test_other_weights_or_settings_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    other = tiny_gpt_oss(tmp_path / "other", seed=1)
    places = by_hand(other, *[((0, 1, 2, 3), (3, 4, 5, 6, 7))] * 4)
    file = written(tmp_path / "placement.json", places)
    different = {1: {"model": str(other), "max_num_seqs": 7, "expert_placement": file}}
    with Gang(checkpoint, 2, 1, specs=different) as gang:
        gang.until(lambda: len(gang.ends) == 2, lost=True)
        for _, why in gang.ends.values():
            assert "differs from engine" in why
            assert "max_num_seqs is" in why
            assert "weights is" in why
            assert "expert_placement is" in why
