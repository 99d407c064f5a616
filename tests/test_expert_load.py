"""The experts' load: counted, recorded, and what the command makes of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from tokenizers import Tokenizer
from typer.testing import CliRunner

from cluster import service
from cluster.cli import app
from cluster.llm import LLM
from cluster.service import free_ports
from deploy.tiny_oss.evaluate import held_out
from deploy.tiny_oss.tasks import CHECKPOINT, TASKS, render
from parallelism.placement import (
    ExpertLoad,
    Placement,
    PlacementError,
    contiguous,
    imbalance,
    parse,
    place,
)
from tests.checkpoints import tiny_gpt_oss
from tests.engines import Engine, greedy, prompts
from workers.config import ModelSpec, ServiceConfig
from workers.rank import Rank
from workers.recording import Recording, nothing
from workers.wire import Request

RECORDED = Path(__file__).parents[1] / "docs" / "tiny-oss-load.json"


def questions(*tasks: str, seed: int) -> list[Request]:
    """The right answers come with them: what a server would compute but for the last token."""
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    texts = [
        render(one.messages, one.tools) + one.completion
        for task in tasks
        for one in held_out(task, 20, seed=seed)
    ]
    encoded = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    return [greedy(str(number), ids, 1) for number, ids in enumerate(encoded)]


def record(*tasks: str, seed: int = 7) -> ExpertLoad:
    engine = Engine(CHECKPOINT, enable_prefix_caching=False, served_model_name="tiny-oss")
    engine.generate(questions(*tasks, seed=seed))
    calls, _ = engine.runner.expert_calls()()
    return msgspec.structs.replace(engine.rank.nothing(), calls=tuple(map(tuple, calls)))


@pytest.fixture(scope="module")
def recorded() -> ExpertLoad:
    return parse(ExpertLoad, RECORDED.read_bytes())


def test_every_computed_token_is_counted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunked, preempted, from the prefix cache: against what the router said."""
    engine = Engine(
        tiny_gpt_oss(tmp_path / "m"),
        kv_cache_memory=130_000,
        block_size=4,
        max_model_len=72,
        max_num_batched_tokens=24,
        max_num_seqs=8,
    )
    arch, forward = engine.model.arch, type(engine.model).forward
    expected = torch.zeros(arch.num_layers, arch.num_experts, dtype=torch.int64)

    def listening(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        logits, routed = forward(engine.model, *args)
        for layer, ids in zip(expected, routed, strict=True):
            layer += torch.bincount(ids.flatten().long(), minlength=arch.num_experts)
        return logits, routed

    monkeypatch.setattr(type(engine.model), "forward", lambda self, *args: listening(*args))
    asked = prompts(12, longest=40, seed=1)
    engine.generate(
        [greedy(str(n), ids, 20) for n, ids in enumerate([*asked, *[max(asked, key=len)] * 3])]
    )
    load = engine.scheduler.load()
    assert load.preemptions
    assert load.prefix_hits
    calls, by_rank = engine.runner.expert_calls()()
    assert calls == expected.tolist()
    assert by_rank == [[sum(layer)] for layer in calls]


def test_the_recorded_load_is_what_tiny_oss_does(recorded: ExpertLoad) -> None:
    """Another processor may decide a close choice of experts otherwise."""
    now = record(*TASKS)
    assert now.config == recorded.config
    for ours, theirs in zip(now.calls, recorded.calls, strict=True):
        assert sum(ours) == sum(theirs)
        assert list(ours) == pytest.approx(list(theirs), rel=0.01)


def test_a_placement_helps_with_what_was_not_recorded(recorded: ExpertLoad) -> None:
    """Other questions of the same tasks; copies help further."""
    other = record(*TASKS, seed=8)
    found = [contiguous(recorded, 4), place(recorded, 4), place(recorded, 4, 2)]
    ratios = [imbalance(each.loads(other)) for each in found]
    assert ratios[0] > 1.05 > 1.03 > ratios[1] > ratios[2]


def test_expert_bytes_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    """In float32, with biases; 2 matrices of gate and up, 1 of down."""
    engine = Engine(tiny_gpt_oss(tmp_path / "m"))
    h, inter = engine.model.arch.hidden_size, engine.model.arch.intermediate_size
    assert engine.rank.nothing().expert_bytes == 4 * (3 * h * inter + 2 * inter + h)


def test_a_recording_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "load.json"
    empty = nothing(CHECKPOINT, "m", 1, 2, 10)
    first = Recording(str(file), empty)
    assert parse(ExpertLoad, file.read_bytes()) == empty
    first.write([[1, 2]])
    first.write([[3, 4]])
    assert parse(ExpertLoad, file.read_bytes()).calls == ((3, 4),)
    Recording(str(file), empty).write([[10, 20]])
    assert parse(ExpertLoad, file.read_bytes()).calls == ((13, 24),)
    assert list(tmp_path.iterdir()) == [file]
    with pytest.raises(ValueError, match="loads of two models"):
        Recording(str(file), nothing(CHECKPOINT, "m", 1, 3))
    file.write_text("{}")
    with pytest.raises(ValueError, match=r"--expert-load .*load\.json: this is no expert load"):
        Recording(str(file), empty)
    with pytest.raises(ValueError, match="No such file"):
        Recording(str(tmp_path / "no" / "load.json"), empty)


def run(*arguments: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["experts", *map(str, arguments)])
    return done.exit_code, done.stdout, " ".join(done.stderr.split())


def test_what_a_placement_would_gain(recorded: ExpertLoad, tmp_path: Path) -> None:
    output = tmp_path / "placement.json"
    status, out, said = run(RECORDED, "--ranks", 4, "--json", "--output", output)
    assert status == 0, said
    rows = json.loads(out)
    assert [row["placement"] for row in rows] == [
        "contiguous",
        *(f"balanced, {n} redundant" for n in range(3)),
    ]
    before = contiguous(recorded, 4)
    assert rows[0]["imbalance"] == pytest.approx(imbalance(before.loads(recorded)), abs=1e-4)
    found = [row["imbalance"] for row in rows]
    assert found[0] > found[1] > found[2] > found[3] >= 1
    assert rows[0]["expert bytes"] == 8 * recorded.expert_bytes, "two experts in four layers"
    placement = parse(Placement, output.read_bytes())
    assert placement == place(recorded, 4, 1)
    # Twice the same load changes no ratio; a placement can be shown on another load.
    status, out, said = run(RECORDED, RECORDED, "--ranks", 4, "--json", "--placement", output)
    assert status == 0, said
    shown = json.loads(out)
    assert [row["imbalance"] for row in shown] == [found[0], found[2], *found[1:]]
    status, out, said = run(RECORDED, "--ranks", 4, "--ranks-per-node", 2, "--memory", "3MiB")
    assert status == 0, said
    assert f"{found[0]:.4}" in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("missing.json", "--ranks", 2), "No such file"),
        ((RECORDED, "--ranks", 9), "9 ranks for 8 experts"),
        ((RECORDED, "--ranks", 4, "--redundant", 7), "7 redundant experts on each of 4 ranks"),
        ((RECORDED, "--ranks", 4, "--redundant", -1), "-1 redundant"),
        ((RECORDED, "--ranks", 4, "--ranks-per-node", 3), "do not fill nodes of 3"),
        ((RECORDED, "--ranks", 4, "--placement", RECORDED), "this is no placement"),
        ((RECORDED, "--ranks", 4, "--memory", "2MiB"), "2,179,584 bytes of experts on one rank"),
        ((RECORDED.parent / "api.md", "--ranks", 4), "this is no expert load"),
    ],
)
def test_what_the_command_refuses(arguments: tuple[object, ...], sentence: str) -> None:
    status, out, said = run(*arguments)
    assert status == 1
    assert not out
    assert sentence in said


def test_a_load_without_tokens_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "load.json"
    Recording(str(file), nothing(CHECKPOINT, "m", 4, 8))
    status, _, said = run(file, "--ranks", 2)
    assert status == 1
    assert "no tokens have been recorded yet" in said


TWO: dict[str, Any] = {"tensor_parallel_size": 2, "enable_expert_parallel": True, "device": "cpu"}


def written(file: Path, placement: Placement) -> str:
    file.write_bytes(msgspec.json.encode(placement))
    return str(file)


@pytest.mark.parametrize(
    ("spec", "change", "sentence"),
    [
        ({"tensor_parallel_size": 1}, {}, "one rank holds all experts"),
        ({"enable_expert_parallel": False}, {}, "add --enable-expert-parallel"),
        ({"tensor_parallel_size": 4}, {}, "the placement is for 2 ranks, not for 4"),
        (
            {},
            {"config": "c" * 64},
            r"is for tiny-oss \(4 layers, 8 experts, config.json c{12}\), not for a model of",
        ),
        ({}, {"slots": 8, "layers": [[[*range(8)], []]]}, r"\(1 layers, .* a model of 4 layers"),
        (
            {},
            {"experts": 7, "slots": 7, "layers": [[[*range(7)], []]] * 4},
            "7 experts, .* 8 experts",
        ),
        ({}, {"slots": 3}, "this is no placement: .*4 experts for 3 slots"),
        ({"expert_placement": "/nowhere/p.json"}, {}, "No such file"),
        ({"expert_placement": str(CHECKPOINT / "config.json")}, {}, "this is no placement"),
    ],
)
def test_a_placement_that_cannot_be_served_is_refused_before_ray_starts(
    spec: dict[str, Any],
    change: dict[str, Any],
    sentence: str,
    tmp_path: Path,
) -> None:
    """And by a rank, whose node may have another file."""
    even = contiguous(nothing(CHECKPOINT, "tiny-oss", 4, 8), 2)
    fields = msgspec.to_builtins(even) | change
    file = tmp_path / "p.json"
    file.write_bytes(msgspec.json.encode(fields))
    asked = ModelSpec(**(TWO | {"model": str(CHECKPOINT), "expert_placement": str(file)} | spec))
    said = f"--expert-placement {asked.expert_placement}: .*{sentence}"
    with pytest.raises(PlacementError, match=said):
        service.preflight(ServiceConfig(models=(asked,), port=free_ports(1)[0]))
    with pytest.raises(PlacementError, match=said):
        Rank(asked)


def test_one_process_needs_no_placement(tmp_path: Path) -> None:
    file = written(tmp_path / "p.json", contiguous(nothing(CHECKPOINT, "m", 4, 8), 2))
    with pytest.raises(ValueError, match=r"p\.json: one rank holds all experts"):
        LLM(expert_placement=file)


@pytest.mark.parametrize(
    ("form", "kv"), [("dense", 4 << 20), ("dequantised", 4 << 20), ("packed", 100_000)]
)
def test_more_copies_than_there_is_memory_for(
    form: str, kv: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused with the numbers before a weight is read, from the very byte on that is missing."""
    directory = tiny_gpt_oss(tmp_path / "m", mxfp4=form != "dense")
    layers = ((tuple(range(8)), (4, 5, 6, 7)),) * 4
    even = contiguous(nothing(directory, "m", 4, 8), 2)
    file = written(tmp_path / "p.json", msgspec.structs.replace(even, slots=8, layers=layers))
    how: Any = {"model": str(directory), "dtype": "float32", "kv_cache_memory": kv}
    spec = ModelSpec(expert_placement=file, **(how | TWO))
    read: list[int] = []

    def load(free: int) -> int:
        read.clear()
        monkeypatch.setattr(Rank, "_free", lambda self: free)
        return Rank(spec).load(None, lambda done, of: read.append(done)).weight_bytes

    needed = load(1 << 40)
    if form == "packed":
        needed = load(needed)  # no room to dequantise them
    assert read
    with pytest.raises(PlacementError) as refused:
        load(needed + kv - 1)
    assert not read
    said = re.fullmatch(
        r"--expert-placement .*p\.json: the placement puts ([0-9,]+) bytes of experts on rank 0 "
        r"\(([0-9,]+) each, 8 slots in 4 layers\); there is room for ([0-9,]+): give it fewer .*",
        str(refused.value),
    )
    assert said, refused.value
    size, each, room = (int(number.replace(",", "")) for number in said.groups())
    assert size == 32 * each == room + 1
    assert load(needed + kv) == needed


def test_the_command_makes_the_path_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Serving changes into a folder of its own."""
    asked: list[ServiceConfig] = []
    monkeypatch.setattr(service, "serve", lambda config, **how: asked.append(config))
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["serve", "--expert-placement", "p.json"])
    assert done.exit_code == 0, done.stderr
    assert asked[0].models[0].expert_placement == str(tmp_path / "p.json")
    monkeypatch.undo()
    port = str(free_ports(1)[0])
    done = CliRunner().invoke(app, ["serve", "--expert-placement", str(RECORDED), "--port", port])
    assert done.exit_code == 1
    assert "one rank holds all experts" in " ".join(done.stderr.split())
