"""The experts' load: counted, recorded, and what the command makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from tokenizers import Tokenizer
from typer.testing import CliRunner

from cluster.cli import app
from deploy.tiny_oss.evaluate import held_out
from deploy.tiny_oss.tasks import CHECKPOINT, TASKS, render
from parallelism.placement import ExpertLoad, Placement, contiguous, imbalance, parse, place
from tests.checkpoints import tiny_gpt_oss
from tests.engines import Engine, greedy, prompts
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
