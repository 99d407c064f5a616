"""``LLM`` and ``moeray generate``: the engine in one process."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moeray import LLM, SamplingParams
from tests.checkpoints import oracle, tiny_gpt_oss
from tests.engines import prompts

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gpt_oss(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tiny_oss() -> LLM:
    return LLM(device="cpu", dtype="float32")


def test_token_ids_equal_transformers(tiny: Path) -> None:
    llm = LLM(str(tiny), device="cpu", dtype="float32", max_num_batched_tokens=40)
    asked = prompts(6)
    params = SamplingParams(max_tokens=10, temperature=0, ignore_eos=True)
    answers = llm.generate(asked, params)
    model = oracle(tiny)
    for prompt, answer in zip(asked, answers, strict=True):
        with torch.inference_mode():
            expected = model.generate(
                torch.tensor([prompt]), max_new_tokens=10, do_sample=False, eos_token_id=None
            )
        assert answer.prompt_token_ids == prompt
        assert answer.token_ids == expected[0, len(prompt) :].tolist()
        assert answer.finish_reason == "length"
        assert answer.text == "", "there is no tokenizer"
    assert llm.generate(asked[0], params)[0] == answers[0], "one prompt instead of many"


def test_seeds(tiny: Path) -> None:
    def tokens(llm: LLM, seed: int | None) -> list[int]:
        params = SamplingParams(temperature=1.0, seed=seed, ignore_eos=True)
        return llm.generate([1, 2, 3], params)[0].token_ids

    llm = LLM(str(tiny), device="cpu")
    assert tokens(llm, 5) == tokens(llm, 5) != tokens(llm, 6)
    assert tokens(llm, None) != tokens(llm, None)
    seeded = LLM(str(tiny), device="cpu", seed=5)
    assert tokens(seeded, None) == tokens(seeded, None) == tokens(llm, 5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda tiny: LLM(tiny, tensor_parallel_size=2), "one process"),
        (lambda tiny: LLM(tiny, dtype="int3"), "dtype"),
        (lambda tiny: LLM(tiny, colour="red"), "colour"),
        (lambda tiny: LLM("/no/such/model"), "neither a directory nor a hub id"),
        (lambda tiny: LLM(tiny, kv_cache_memory=100), "KV|kv"),
        (lambda tiny: LLM(tiny, max_model_len=513), "512"),
        (lambda tiny: LLM(tiny, kernels="triton"), "needs a CUDA device"),
        (lambda tiny: LLM(tiny).generate("text"), "tokenizer"),
        (lambda tiny: LLM(tiny).generate([1, 256]), "the vocabulary has 256"),
        (lambda tiny: LLM(tiny).generate([1], SamplingParams(temperature=9)), "temperature"),
        (lambda tiny: LLM(tiny).generate([1] * 600), "maximum context length is 512"),
        (lambda tiny: LLM(tiny).chat([{"role": "user", "content": "hi"}]), "no tokenizer"),
    ],
)
def test_errors_are_sentences(wrong: Callable[[str], Any], message: str, tiny: Path) -> None:
    with pytest.raises(ValueError, match=message):
        wrong(str(tiny))


def test_tiny_oss_answers(tiny_oss: LLM) -> None:
    def ask(text: str) -> Any:
        return tiny_oss.chat([{"role": "user", "content": text}])  # as the README does

    answer = ask("What is 17 + 25?")
    assert (answer.text, answer.finish_reason) == ("42", "stop")
    assert "7+5+0=12" in answer.reasoning
    assert ask("Reverse the word planet.").text == "tenalp"


def test_stop_strings_end_the_text_and_the_request(tiny_oss: LLM) -> None:
    messages = [{"role": "user", "content": "Spell the word banana."}]
    whole = tiny_oss.chat(messages, SamplingParams(max_tokens=100))
    cut = tiny_oss.chat(messages, SamplingParams(max_tokens=100, stop="n-a-n"))
    assert (whole.text, cut.text) == ("b-a-n-a-n-a", "b-a-")
    assert cut.finish_reason == "stop"
    assert tiny_oss._scheduler.load().running == 0


def test_streams_give_the_same_text_and_may_be_left(tiny_oss: LLM) -> None:
    messages = [{"role": "user", "content": "Spell the word banana."}]
    params = SamplingParams(max_tokens=100)
    deltas = [d.text for d in tiny_oss.stream(messages, params) if d.kind == "content"]
    assert len(deltas) > 5
    assert "".join(deltas) == "b-a-n-a-n-a"
    with contextlib.closing(tiny_oss.stream(messages, params)) as stream:
        next(stream)
    load = tiny_oss._scheduler.load()
    assert (load.running, load.waiting) == (0, 0)
    assert load.free == load.blocks


def test_choices_and_log_probabilities(tiny_oss: LLM) -> None:
    how: dict[str, Any] = {"max_tokens": 12, "temperature": 1.5, "seed": 7, "logprobs": 5}
    asked = ["What is 17 + 25? Answer in words, please", "Spell"]
    answers = tiny_oss.generate(asked, SamplingParams(n=3, **how))
    ids = [answer.token_ids for answer in answers]
    assert len(ids) == 6
    assert len({*map(tuple, ids)}) > 3, "choices of one prompt differ"
    assert ids == [a.token_ids for a in tiny_oss.generate(asked, SamplingParams(n=3, **how))]
    first = tiny_oss.generate(asked, SamplingParams(**how))
    assert [answer.token_ids for answer in first] == ids[::3], "the first is what it is alone"
    for answer in answers:
        assert answer.tokens
        assert [token.logprobs.values for token in answer.tokens] == [
            sorted(token.logprobs.values, reverse=True) for token in answer.tokens
        ]
    greedy = tiny_oss.generate("Spell", SamplingParams(n=4, temperature=0))
    assert len({tuple(answer.token_ids) for answer in greedy}) == 1
    messages = [{"role": "user", "content": "Spell the word cat."}]
    answer = tiny_oss.chat(messages, SamplingParams(logprobs=2))
    text = tiny_oss._model.text
    assert "".join(text.decode([token.id]) for token in answer.tokens) == answer.text == "c-a-t"
    deltas = [*tiny_oss.stream(messages, SamplingParams(logprobs=2))]
    assert [token for delta in deltas for token in delta.tokens] == answer.tokens
    with pytest.raises(ValueError, match="n=2"):
        tiny_oss.chat(messages, SamplingParams(n=2))


def test_penalties_and_biases_reach_the_model(tiny_oss: LLM) -> None:
    def tokens(**how: Any) -> list[int]:
        params = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True, **how)
        return tiny_oss.generate("a a a a a a a a", params)[0].token_ids

    plain = tokens()
    assert tokens(logit_bias={plain[0]: -100})[0] != plain[0]
    assert tokens(logit_bias={9: 100}) == [9] * 30
    assert len({*tokens(frequency_penalty=2, presence_penalty=2)}) > len({*plain})
    assert tokens(repetition_penalty=3) != plain
    assert tokens(min_p=1) == plain


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "moeray", *arguments],
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "160"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_moeray_generate() -> None:
    done = command("generate", "--prompt", "What is 17 + 25?", "--prompt", "Spell the word cat.")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "42\nc-a-t\n"


def test_moeray_version_and_help() -> None:
    done = command("--version")
    assert done.stdout.startswith("moeray 0.")
    done = command("serve", "--help")
    assert done.returncode == 0
    for flag in ("--tensor-parallel-size", "--kv-cache-memory", "--enable-expert-parallel"):
        assert flag in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "/no/such/model", "--prompt", "x"), "neither a directory nor a hub id"),
        (("generate",), "give --prompt TEXT"),
        (("generate", "--prompt", "x", "--dtype", "float8"), "dtype"),
        (("generate", "--prompt", "x", "--kv-cache-memory", "lots"), "no size"),
        (
            ("generate", "--prompt", "x", "--kv-cache-dtype", "int8"),
            "--kv-cache-dtype: Invalid enum",
        ),
        (("serve", "--replicas", "2"), "--replicas is not available yet"),
        (("serve", "--data-parallel-size", "2"), "needs --enable-expert-parallel"),
        (("serve", "-tp", "3"), "does not divide the model's 4 attention heads"),
        (("serve", "--autoscale", "1:4"), "--autoscale is not available yet"),
        (("serve", "--kernels", "triton"), "--kernels triton needs a CUDA device"),
        (("status", "--url", "http://127.0.0.1:9"), "nothing answers"),
    ],
)
def test_commands_end_with_a_sentence(arguments: tuple[str, ...], message: str) -> None:
    done = command(*arguments)
    assert done.returncode in (1, 2)
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
