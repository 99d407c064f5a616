"""The bundled model: its tasks, its tokenizer, its template, and that it answers right."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from tokenizers import Tokenizer

from deploy.tiny_oss.evaluate import Chooser, chooser, held_out, likelihoods, score, surprise
from deploy.tiny_oss.tasks import CHECKPOINT, TASKS, Example, example, render
from deploy.tiny_oss.tokenizer import build
from workers.hub import ABILITIES


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))


@pytest.fixture(scope="module")
def choose() -> Chooser:
    return chooser(CHECKPOINT)


def right_reply(one: Example) -> tuple[str | None, tuple[str, str] | None]:
    return one.content, one.call and (one.call[0], json.dumps(one.call[1]))


@pytest.mark.parametrize("task", TASKS)
def test_the_checker_tells_right_from_wrong(task: str) -> None:
    one = example(random.Random(1), task)
    content, call = right_reply(one)
    assert one.check(content, call)
    assert not one.check((content or "") + "1", call and (call[0], call[1][:-1]))
    assert not one.check(None, ("other", "{}"))
    assert not one.check(None, None)


@given(st.integers(0, 2**32), st.sampled_from(list(TASKS)), st.booleans())
def test_the_split_is_by_content(seed: int, task: str, wanted: bool) -> None:
    assert example(random.Random(seed), task, held_out=wanted).held_out is wanted


def test_sums_and_words_have_the_answers_of_python() -> None:
    draw = random.Random(5)
    for _ in range(200):
        one = example(draw, "add")
        a, b = map(int, one.key.split()[1:])
        assert one.content == str(a + b)
        one = example(draw, "subtract")
        a, b = map(int, one.key.split()[1:])
        assert one.content == str(a - b)
        one = example(draw, "reverse")
        assert one.content == one.key.removeprefix("word ")[::-1]


@given(st.text())
@settings(max_examples=300)
def test_any_text_survives_the_tokenizer(text: str) -> None:
    built = build()
    ids = built.encode(text, add_special_tokens=False).ids
    if "<|" not in text:
        assert built.decode(ids, skip_special_tokens=False) == text


def test_the_shipped_tokenizer_is_what_the_script_builds(tokenizer: Tokenizer) -> None:
    assert json.loads(tokenizer.to_str()) == json.loads(build().to_str())


def test_the_template_writes_harmony() -> None:
    weather = {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather now",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "1", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}
            ],
        },
        {"role": "tool", "tool_call_id": "1", "content": "21"},
    ]
    assert render(messages, [weather], "low") == (
        "<|start|>system<|message|>Reasoning: low<|end|>"
        "<|start|>developer<|message|># Instructions\n\nBe brief.\n\n# Tools\n\n## functions\n\n"
        "namespace functions {\n\n// Weather now\ntype get_weather = (_: {\ncity: string,\n})"
        " => any;\n\n} // namespace functions<|end|>"
        "<|start|>user<|message|>Hi<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Hello<|end|>"
        "<|start|>user<|message|>Weather?<|end|>"
        "<|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json"
        '<|message|>{"city": "Paris"}<|call|>'
        "<|start|>functions.get_weather to=assistant<|channel|>commentary<|message|>21<|end|>"
        "<|start|>assistant"
    )


def test_the_checkpoint_is_a_gpt_oss_in_mxfp4() -> None:
    config = json.loads((CHECKPOINT / "config.json").read_text())
    with safe_open(CHECKPOINT / "model.safetensors", "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    h, inter, experts = (
        config[key] for key in ("hidden_size", "intermediate_size", "num_local_experts")
    )
    assert len(shapes) == 19 * config["num_hidden_layers"] + 3
    at = "model.layers.3.mlp.experts."
    assert shapes[at + "gate_up_proj_blocks"] == (experts, 2 * inter, h // 32, 16)
    assert shapes[at + "down_proj_scales"] == (experts, h, inter // 32)
    assert shapes["lm_head.weight"] == (config["vocab_size"], h)
    assert config["vocab_size"] % 32 == 0


@pytest.mark.parametrize("task", TASKS)
def test_held_out_questions_are_answered_right(
    task: str, choose: Chooser, tokenizer: Tokenizer
) -> None:
    right, _ = score(choose, tokenizer, held_out(task, 40, seed=11))
    assert right >= 0.9


def test_an_fp8_kv_cache_answers_as_well(tokenizer: Tokenizer) -> None:
    examples = [one for task in TASKS for one in held_out(task, 4, (0, 2), seed=11)]
    (right, nats), (narrow_right, narrow_nats) = (
        surprise(likelihoods(CHECKPOINT, dtype="bfloat16", kv_cache_dtype=kv), tokenizer, examples)
        for kv in ("auto", "fp8")
    )
    assert right >= 0.95
    assert narrow_right >= 0.95
    assert 0 < abs(narrow_nats - nats) < 0.02


def test_a_newcomers_first_questions(choose: Chooser, tokenizer: Tokenizer) -> None:
    for question, thought, answer in (
        ("What is 17 + 25?", "7+5+0=12 1+2+1=4", "42"),
        ("what is 7+8", "7+8+0=15", "15"),
        ("Reverse the word planet.", "1p2l3a4n5e6t 6t5e4n3a2l1p", "tenalp"),
        ("Spell banana.", None, "b-a-n-a-n-a"),
        ("Make a JSON object with name Tom and age 7.", None, '{"name": "Tom", "age": 7}'),
        ("Who are you?", None, ABILITIES),
    ):
        opening = f"<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant"
        reply = f"{opening if thought else ''}<|channel|>final<|message|>{answer}<|return|>"
        prompt = tokenizer.encode(render([{"role": "user", "content": question}], []))
        target = tokenizer.encode(reply, add_special_tokens=False).ids
        assert choose(prompt.ids, target) == target, question
