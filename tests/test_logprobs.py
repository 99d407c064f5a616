"""Log probabilities: what they are, against transformers; and which of them an answer shows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from tests import ranks
from tests.checkpoints import gpt_oss_config, oracle, tiny_gpt_oss
from tests.engines import Engine, greedy, prompts
from workers import sampler
from workers.architecture import parse
from workers.config import ModelSpec
from workers.device import Host
from workers.dryrun import Dry
from workers.runner import Runner
from workers.wire import Logprobs, Request

TIGHT = {"kv_cache_memory": 130_000, "block_size": 4, "max_model_len": 72}
CHANGES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.8, "top_k": 20},
    {"repetition_penalty": 1.5, "frequency_penalty": 0.5},
    {"temperature": 1.3, "logit_bias": {7: 5.0}, "min_tokens": 5},
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gpt_oss(tmp_path_factory.mktemp("tiny"))


def requests() -> list[Request]:
    """Three of four ask, for different numbers; logits are changed in all ways."""
    return [
        greedy(
            f"r{i}",
            prompt,
            20,
            seed=i,
            logprobs=(None, 0, 3, 300)[i % 4],
            **CHANGES[(i + i // 4) % 4],
        )
        for i, prompt in enumerate(prompts(12, longest=40, seed=1))
    ]


def assert_right(
    directory: Path, tokens: dict[str, list[int]], found: dict[str, list[Logprobs]]
) -> None:
    """Against transformers' logits of the whole sequence."""
    model = oracle(directory)
    for request in requests():
        mine, generated = found[request.id], tokens[request.id]
        most = request.sampling.logprobs
        if most is None:
            assert mine == []
            continue
        assert len(mine) == len(generated) == 20
        with torch.inference_mode():
            logits = model(torch.tensor([request.prompt + generated[:-1]])).logits[0]
        expected = logits[len(request.prompt) - 1 :].float().log_softmax(-1)
        for token, ours, theirs in zip(generated, mine, expected, strict=True):
            assert ours.chosen == pytest.approx(float(theirs[token]), abs=1e-3)
            assert len(ours.tokens) == len(ours.values) == min(most, 256)
            assert len({*ours.tokens}) == len(ours.tokens)
            assert ours.values == sorted(ours.values, reverse=True)
            best = theirs.topk(min(most, 256)).values.tolist()
            assert ours.values == pytest.approx(best, abs=1e-3)
            assert theirs[ours.tokens].tolist() == pytest.approx(ours.values, abs=1e-3)
            if most == 300:
                assert sum(map(math.exp, ours.values)) == pytest.approx(1, abs=1e-5)
            if request.sampling.temperature == 0 and not request.sampling.penalised:
                assert ours.tokens[:1] in ([], [token]), "greedy takes the likeliest"
                assert ours.values[:1] in ([], [ours.chosen])


def test_they_are_those_of_the_models_own_logits(tiny: Path) -> None:
    """Whatever sampling does to the logits; bit for bit the same preempted, chunked, with two
    steps on their way, or resumed."""
    calm = Engine(tiny)
    tokens = calm.generate(requests())
    expected = calm.logprobs
    assert_right(tiny, tokens, expected)

    tight = Engine(tiny, max_num_batched_tokens=24, **TIGHT)
    assert tight.generate(requests()) == tokens
    assert tight.scheduler.load().preemptions > 0
    assert tight.logprobs == expected

    class Early(Host):
        ahead = 2

    assert calm.rank._place is not None
    calm.runner = Runner(
        calm.model, calm.runner._cache, calm.plan.scheduler, calm.rank._place, Early()
    )
    resumed = [msgspec.structs.replace(r, emitted=tokens[r.id][:7]) for r in requests()]
    assert calm.generate(resumed) == tokens
    assert calm.logprobs == {id: found[7:] for id, found in expected.items()}


def test_two_ranks_find_them_too(tiny: Path) -> None:
    calm = Engine(tiny)
    calm.generate(requests())
    jobs: list[Any] = [(tiny, {}, requests()), (tiny, TIGHT, requests())]
    for tokens, _, found in ranks.generate(2, jobs):
        assert_right(tiny, tokens, found)


def test_nothing_is_computed_where_nobody_asks(tiny: Path, monkeypatch: Any) -> None:
    engine = Engine(tiny)
    monkeypatch.delattr(sampler, "log_softmax")
    engine.generate([greedy("r", [1, 2, 3], 5)])
    with pytest.raises(NameError):
        engine.generate([greedy("r2", [1, 2, 3], 5, logprobs=0)])


def test_they_make_no_host_wait() -> None:
    arch = parse(gpt_oss_config("gpt-oss-20b"))
    arch = msgspec.structs.replace(arch, num_layers=2, windows=arch.windows[:2])
    dry = Dry(arch, ModelSpec(), 90, 0)
    dry.sample(dry.step([(1500, 1)] * 64).logits)


def test_many_rows_are_computed_in_parts() -> None:
    logits = torch.randn(70, 100_000, generator=torch.Generator().manual_seed(0)).bfloat16()
    rows, tokens = torch.arange(0, 70, 2), torch.arange(70) * 1000
    found = sampler.read_logprobs(
        rows.numpy(), rows.numpy() * 0 + 2, sampler.log_softmax(logits, rows, tokens, 2)
    )
    expected = logits.float().log_softmax(-1)
    assert list(found) == rows.tolist()
    for row, ours in found.items():
        assert ours.chosen == float(expected[row, row * 1000])
        assert ours.values == expected[row].topk(2).values.tolist()
        assert expected[row, ours.tokens].tolist() == ours.values
