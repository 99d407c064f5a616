"""Bodies in, bodies and streams out; judged by OpenAI's own types."""

from __future__ import annotations

import contextlib
import itertools
import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import msgspec
import openai as official
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types import Completion
from openai.types import chat as chat_types
from openai.types import completion_create_params as text_params
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.chat import completion_create_params as chat_params

from cluster import openai, reply, schema
from cluster.openai import Call, Model
from cluster.reply import Reply
from cluster.schema import Refusal
from cluster.text import Text
from tests import vocabularies
from workers.wire import FinishReason, Output

ROOT = Path(__file__).parent.parent


@cache
def text(kind: str = "harmony") -> Text:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        if kind == "harmony":
            template = vocabularies.HARMONY_TEMPLATE
            vocabularies.save(path, vocabularies.byte_level(), template)
        (path / "generation_config.json").write_text(
            '{"temperature": 0.5, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.25}'
        )
        return Text(path)


def model(kind: str = "harmony", max_model_len: int = 512) -> dict[str, Model]:
    one = Model(name="tiny", text=text(kind), max_model_len=max_model_len, vocab_size=432)
    return {"tiny": one}


def parse(kind: str, models: dict[str, Model] | None = None, **fields: Any) -> Call:
    read = openai.chat if kind == "chat" else openai.completions
    return read(json.dumps(fields).encode(), models or model(), id="1", seed=11, now=5)


def ask(**fields: Any) -> Call:
    return parse("chat", **({"messages": [{"role": "user", "content": "hello"}]} | fields))


def complete(**fields: Any) -> Call:
    return parse("completions", **({"prompt": "hello"} | fields))


def refusal(kind: str, **fields: Any) -> tuple[int, dict[str, Any]]:
    with pytest.raises(Refusal) as caught:
        (ask if kind == "chat" else complete)(**fields)
    error = json.loads(caught.value.body)["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    return caught.value.status, error


# ---- Bodies in


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("hello<|end|>", [["hello<|end|>"]]),
        ([3, 5, 7], [[3, 5, 7]]),
        (["a", "b"], [["a"], ["b"]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_prompts_of_all_kinds(prompt: Any, expected: list[list[Any]]) -> None:
    call = complete(prompt=prompt)
    prompts = [text().encode(item[0]) if isinstance(item[0], str) else item for item in expected]
    assert [request.prompt for request in call.requests] == prompts
    ids = [request.id for request in call.requests]
    assert len(set(ids)) == len(ids)
    assert ids[0].startswith("cmpl-")


def test_what_a_silent_request_gets() -> None:
    call = complete()
    sampling = call.requests[0].sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_k) == (16, 0.5, 7)
    assert (sampling.min_p, sampling.repetition_penalty, sampling.logprobs) == (0.1, 1.25, None)
    assert not any((sampling.presence_penalty, sampling.frequency_penalty, sampling.logit_bias))
    assert (sampling.top_p, sampling.seed, call.stream, call.stop) == (1.0, 11, False, ())
    chat = ask()
    room = 512 - len(chat.requests[0].prompt)
    assert chat.requests[0].sampling.max_tokens == room
    assert chat.requests[0].prompt[-2:] == text().render([])[-2:]


def test_every_field_arrives() -> None:
    call = ask(
        model="tiny", max_completion_tokens=9, temperature=0, top_p=0.5, top_k=-1, seed=-1,
        stop="x", stop_token_ids=[4], min_tokens=2, ignore_eos=True, return_token_ids=True,
        priority=-3, cache_salt="s", stream=True, stream_options={"include_usage": True},
        reasoning_effort="high", user="u", store=True, n=1, logprobs=True, top_logprobs=20,
        presence_penalty=-2, frequency_penalty=1.5, repetition_penalty=1, min_p=0.25,
        logit_bias={"431": -100, "0": 2.5}, include_stop_str_in_output=True,
        tools=[{"type": "function", "function": {"name": "f", "parameters": {"a": 1}}}],
    )  # fmt: skip
    request = call.requests[0]
    sampling = request.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p) == (9, 0.0, 0.5)
    assert (sampling.top_k, sampling.seed, sampling.min_tokens) == (0, (1 << 63) - 1, 2)
    assert (sampling.ignore_eos, sampling.stop_token_ids, call.stop) == (True, (4,), ("x",))
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (-2, 1.5)
    assert (sampling.repetition_penalty, sampling.min_p, sampling.logprobs) == (1, 0.25, 20)
    assert sampling.logit_bias == {431: -100, 0: 2.5}
    assert (request.priority, request.salt, call.return_token_ids) == (-3, "s", True)
    assert (call.include_stop, call.skip_control, call.echoes) == (True, True, ())
    assert call.stream
    assert call.include_usage
    shown = text().decode(request.prompt, False)
    assert "Reasoning: high" in shown
    assert 'type f = (_: {"a": 1}) => any;' in shown
    assert "type f" not in text().decode(
        ask(tools=TOOLS, tool_choice="none").requests[0].prompt, False
    )


TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]


def test_an_answer_can_be_sent_back_as_it_came() -> None:
    answer = {
        "role": "assistant", "content": None, "refusal": None, "annotations": None, "audio": None,
        "function_call": None, "reasoning_content": "hm",
        "tool_calls": [
            {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": "é"}'}}
        ],
    }  # fmt: skip
    call = ask(
        messages=[
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            },
            answer,
            {"role": "tool", "tool_call_id": "c", "content": "sun"},
        ]
    )
    shown = text().decode(call.requests[0].prompt, False)
    assert "<|channel|>analysis<|message|>hm<|end|>" in shown
    assert "<|message|>a\nb<|end|>" in shown
    assert 'to=functions.f<|channel|>commentary json<|message|>{"a": "é"}<|call|>' in shown


def test_what_was_refused_can_be_sent_back() -> None:
    """As a part, as the field of an answer, or beside what was said before it."""
    said: list[dict[str, Any]] = [
        {"content": [{"type": "text", "text": "well"}, {"type": "refusal", "refusal": "no"}]},
        {"content": "well", "refusal": "no"},
    ]
    for fields in said:
        messages = [{"role": "assistant"} | fields, {"role": "user", "content": "why?"}]
        shown = text().decode(ask(messages=messages).requests[0].prompt, False)
        assert "<|message|>well\nno<|" in shown
    messages = [{"role": "assistant", "refusal": "no"}, {"role": "user", "content": "why?"}]
    assert "<|message|>no<|" in text().decode(ask(messages=messages).requests[0].prompt, False)


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant", "tool"])
def test_a_message_has_the_fields_of_its_role(role: str) -> None:
    """Others are refused by name; null and nothing are not sent."""
    call = {"id": "c", "function": {"name": "f", "arguments": "{}"}}
    before = {"role": "assistant", "tool_calls": [call]}
    message = {"role": role, "content": "a", "name": "f"}
    if role == "tool":
        message["tool_call_id"] = "c"
    values: dict[str, Any] = {
        "tool_call_id": "c",
        "tool_calls": [call],
        "reasoning_content": "hm",
        "reasoning": "hm",
        "refusal": "no",
        "annotations": [{"type": "url_citation"}],
    }
    assert values.keys() == schema.ROLES.keys()
    for name, value in values.items():
        ask(messages=[before, message | {name: message.get(name)}])
        if schema.ROLES[name] == role:
            ask(messages=[before, message | {name: value}])
        else:
            _, error = refusal("chat", messages=[before, message | {name: value}])
            assert error["param"] == "messages[1]"
            assert f"{name} belongs to" in error["message"]
    part = {"type": "refusal", "refusal": "no"}
    if role != "assistant":
        _, error = refusal("chat", messages=[before, message | {"content": [part]}])
        assert "'refusal'" in error["message"]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}},
        {"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}},
        {"type": "file", "file": {"file_id": "file-1"}},
        {"type": "video_url", "video_url": {"url": "https://example.com"}},
        {"image_url": {"url": "x"}, "type": "image_url"},
    ],
)
def test_parts_are_refused_for_what_they_are(part: dict[str, Any]) -> None:
    content = [{"type": "text", "text": "what is this?"}, part]
    status, error = refusal("chat", messages=[{"role": "user", "content": content}])
    assert (status, error["param"]) == (400, "messages[0].content[1]")
    assert f"parts of type '{part['type']}' are not available yet" in error["message"]


@pytest.mark.parametrize("kind", ["chat", "completions"])
def test_every_field_of_openais_schema_is_accounted_for(kind: str) -> None:
    params = chat_params if kind == "chat" else text_params
    theirs = set(params.CompletionCreateParamsBase.__annotations__) | {"stream"}
    ours = (schema.ChatBody if kind == "chat" else schema.CompletionsBody).__struct_fields__
    tables = [set(ours), schema.IGNORED[kind], set(schema.LATER[kind]), set(schema.NEVER[kind])]
    assert theirs <= set().union(*tables)
    assert sum(map(len, tables)) == len(set().union(*tables)), "a field has one fate"
    page = (ROOT / "docs" / "api.md").read_text()
    for name in set().union(*tables):
        assert f"`{name}`" in page, f"docs/api.md does not say what becomes of {name}"


@pytest.mark.parametrize("kind", ["chat", "completions"])
def test_fields_not_served_are_refused_by_name_unless_neutral(kind: str) -> None:
    for table, why in ((schema.LATER, "not available yet"), (schema.NEVER, "not supported")):
        for name, neutral in table[kind].items():
            status, error = refusal(kind, **{name: "surely not neutral"})
            assert (status, error["param"]) == (400, name)
            assert why in error["message"]
            for value in (*neutral, None):
                (ask if kind == "chat" else complete)(**{name: value})
    for name in schema.IGNORED[kind]:
        (ask if kind == "chat" else complete)(**{name: {"any": "thing"}})


CONTENT = "messages[0].content[0]"


@pytest.mark.parametrize(
    ("kind", "fields", "param", "says"),
    [
        ("chat", {"temprature": 1, "tpo_p": 2}, "temprature", "'tpo_p'"),
        ("chat", {"temperature": "hot"}, "temperature", "float"),
        ("chat", {"temperature": 2.5}, "temperature", "from 0 to 2"),
        ("chat", {"top_p": -0.1}, "top_p", "from 0 to 1"),
        ("chat", {"top_k": -2}, "top_k", "from -1"),
        ("chat", {"top_k": 1 << 31}, "top_k", "from"),
        ("chat", {"seed": 1 << 70}, "seed", "from"),
        ("chat", {"seed": True}, "seed", "int"),
        ("chat", {"n": 0}, "n", "from 1 to 128"),
        ("chat", {"n": 129}, "n", "from 1 to 128"),
        ("chat", {"n": True}, "n", "int"),
        ("completions", {"n": 103, "prompt": ["a"] * 10}, "n", "at most 1024"),
        ("chat", {"min_p": 1.01}, "min_p", "from 0 to 1"),
        ("chat", {"presence_penalty": 2.1}, "presence_penalty", "from -2 to 2"),
        ("chat", {"frequency_penalty": -2.1}, "frequency_penalty", "from -2 to 2"),
        ("chat", {"repetition_penalty": 0}, "repetition_penalty", "from 0.01"),
        ("chat", {"logit_bias": {"432": 1}}, "logit_bias", "432"),
        ("chat", {"logit_bias": {"-1": 1}}, "logit_bias", "-1"),
        ("chat", {"logit_bias": {"hello": 1}}, "logit_bias", "hello"),
        ("chat", {"logit_bias": {"9" * 5000: 1}}, "logit_bias", "..."),
        ("chat", {"logit_bias": {"١": 1}}, "logit_bias", "from 0 to 431"),
        ("chat", {"logit_bias": {"3": 100.5}}, "logit_bias", "from -100 to 100"),
        ("chat", {"logit_bias": {str(i): 1 for i in range(301)}}, "logit_bias", "at most 300"),
        ("chat", {"logit_bias": [1]}, "logit_bias", "object"),
        ("chat", {"logprobs": 3}, "logprobs", "bool"),
        ("chat", {"logprobs": True, "top_logprobs": 21}, "top_logprobs", "from 0 to 20"),
        ("chat", {"top_logprobs": 1}, "top_logprobs", "needs logprobs"),
        ("completions", {"logprobs": 6}, "logprobs", "from 0 to 5"),
        ("completions", {"logprobs": True}, "logprobs", "int"),
        ("completions", {"logprobs": 0, "echo": True}, "echo", "logprobs"),
        ("chat", {"max_tokens": 0}, "max_tokens", "at least 1"),
        ("chat", {"max_tokens": 3, "max_completion_tokens": 3}, "max_completion_tokens", "both"),
        ("chat", {"min_tokens": 5, "max_tokens": 4}, "min_tokens", "from 0 to 4"),
        ("chat", {"stop": ["a"] * 17}, "stop", "at most 16"),
        ("chat", {"stop": ""}, "stop", "1 to 1024"),
        ("chat", {"stop": ["x" * 1025]}, "stop", "1 to 1024"),
        ("chat", {"stop": [1]}, "stop[0]", "str"),
        ("chat", {"stop_token_ids": [432]}, "stop_token_ids", "432"),
        ("chat", {"stream_options": {"include_usage": True}}, "stream_options", "stream=true"),
        ("chat", {"stream": True, "stream_options": {"x": 1}}, "stream_options", "x"),
        ("chat", {"reasoning_effort": "huge"}, "reasoning_effort", "low, medium or high"),
        ("chat", {"tool_choice": "required"}, "tool_choice", "no tools"),
        ("chat", {"tool_choice": "sometimes"}, "tool_choice", "sometimes"),
        ("chat", {"tool_choice": {"type": "function"}}, "tool_choice", "function"),
        ("chat", {"tool_choice": {"type": "custom"}}, "tool_choice.type", "custom"),
        (
            "chat",
            {"tool_choice": {"type": "function", "function": {"name": "f"}}},
            "tool_choice",
            "no tool is called 'f'",
        ),
        ("chat", {"response_format": {"type": "xml"}}, "response_format.type", "xml"),
        (
            "chat",
            {"response_format": {"type": "json_schema"}},
            "response_format.json_schema",
            "needs a name and a schema",
        ),
        (
            "chat",
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "a b", "schema": {}},
                }
            },
            "response_format.json_schema",
            "64",
        ),
        (
            "chat",
            {"response_format": {"type": "json_object"}, "ignore_eos": True},
            "ignore_eos",
            "form",
        ),
        ("completions", {"response_format": {"type": "json_object"}}, "response_format", "not ava"),
        (
            "chat",
            {"tools": [{"type": "custom", "custom": {"name": "f"}}]},
            "tools[0]",
            "tools of type 'custom' are not supported",
        ),
        ("chat", {"tools": [{"function": {"name": "f"}}]}, "tools[0]", "type"),
        (
            "chat",
            {"response_format": {"type": "text", "json_schema": {"name": "a", "schema": {}}}},
            "response_format",
            "json_schema does not go with type 'text'",
        ),
        (
            "chat",
            {"response_format": {"type": "json_object", "json_schema": {"name": "a"}}},
            "response_format",
            "json_schema does not go",
        ),
        ("chat", {"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0]", "64"),
        (
            "chat",
            {"tools": [{"type": "function", "function": {"name": "f"}}] * 2},
            "tools[1]",
            "'f'",
        ),
        ("chat", {"messages": []}, "messages", "empty"),
        ("chat", {"messages": [{"role": "king", "content": ""}]}, "messages[0].role", "king"),
        ("chat", {"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
        ("chat", {"messages": [{"role": "user", "content": "", "x": 1}]}, "messages[0]", "x"),
        ("chat", {"messages": [{"role": "tool", "content": ""}]}, "messages[0]", "tool_call_id"),
        (
            "chat",
            {"messages": [{"role": "tool", "tool_call_id": "c", "content": ""}]},
            "messages[0].tool_call_id",
            "no message before it has a tool call with the id 'c'",
        ),
        (
            "chat",
            {"messages": [{"role": "assistant", "reasoning": "a", "reasoning_content": "b"}]},
            "messages[0]",
            "differ",
        ),
        (
            "chat",
            {
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [{"id": "c", "type": "custom", "custom": {"name": "f"}}],
                    }
                ]
            },
            "messages[0].tool_calls[0]",
            "calls of type 'custom' are not supported",
        ),
        ("chat", {"messages": [{"role": "user", "content": [{"text": "a"}]}]}, CONTENT, "type"),
        ("chat", {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, CONTENT, "text"),
        ("chat", {"messages": [{"role": "user", "content": [{"type": []}]}]}, CONTENT, "list"),
        ("completions", {"prompt": None}, "prompt", "missing"),
        ("completions", {"prompt": ""}, "prompt", "empty"),
        ("completions", {"prompt": []}, "prompt", "empty"),
        ("completions", {"prompt": [[]]}, "prompt", "empty"),
        ("completions", {"prompt": [1, "a"]}, "prompt", "mixes"),
        ("completions", {"prompt": [1, [1]]}, "prompt", "mixes"),
        ("completions", {"prompt": [432]}, "prompt", "432"),
        ("completions", {"prompt": [-1]}, "prompt", "-1"),
        ("completions", {"prompt": [1.5]}, "prompt[0]", "float"),
        ("completions", {"prompt": ["a"] * 1025}, "prompt", "1024"),
        ("completions", {"messages": []}, "messages", "unknown"),
    ],
)
def test_wrong_values_are_refused_with_their_name(
    kind: str, fields: dict[str, Any], param: str, says: str
) -> None:
    status, error = refusal(kind, **fields)
    assert status == 400
    assert error["param"] == param
    assert says in error["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b'"a"', b"\xff", b'{"prompt": "\\ud800"}', b"[" * 200_000,
        b'{"prompt":' + b"[" * 200_000, b'{"prompt": 1e999}', b'{"prompt": NaN}',
        b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", b'{"prompt": "a\x00"}',
        b'{"prompt": "a", "x": ' + b'{"a":' * 5000 + b"1" + b"}" * 5000 + b"}",
    ],
)  # fmt: skip
def test_what_is_no_request_is_refused(body: bytes) -> None:
    for read in (openai.chat, openai.completions):
        with pytest.raises(Refusal) as caught:
            read(body, model(), id="1", seed=0, now=0)
        assert caught.value.status == 400


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


@settings(max_examples=1500)
@given(data=st.data())
@pytest.mark.parametrize("kind", ["chat", "completions"])
def test_any_value_in_any_field_is_served_or_refused(kind: str, data: st.DataObject) -> None:
    struct = schema.ChatBody if kind == "chat" else schema.CompletionsBody
    names = [*struct.__struct_fields__, *schema.LATER[kind], *schema.NEVER[kind]]
    fields = data.draw(st.dictionaries(st.sampled_from(names), JSON, max_size=3))
    call: Call | None
    try:
        call = (ask if kind == "chat" else complete)(**fields)
    except Refusal as refused:
        error = json.loads(refused.body)["error"]
        call, known = None, refused.status in (400, 404) and error["message"]
    else:
        known = True
    assert known
    if call is not None:
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(call.requests))


@pytest.mark.parametrize("depth", [100, 400, 800, 900, 950, 980, 990, 999])
def test_deep_and_long_values_are_refused_in_short(depth: int) -> None:
    deep = "[" * depth + "]" * depth
    for field in ("logit_bias", "prompt", "tools", "mess", "stop", "x" * 100_000):
        for value in (deep, f'"{"y" * 100_000}"'):
            with pytest.raises(Refusal) as caught:
                openai.chat(f'{{"{field}": {value}}}'.encode(), model(), id="1", seed=0, now=0)
            assert len(caught.value.body) < 1000
    long = {"role": "y" * 100_000, "content": "a", "z" * 100_000: 1}
    for fields in ({"model": "m" * 100_000}, {"messages": [long]}, {"tool_choice": "t" * 100_000}):
        assert len(refusal("chat", **fields)[1]["message"]) < 1000
    nested = '{"a":' * depth + "1" + "}" * depth
    tool = f'{{"type": "function", "function": {{"name": "f", "parameters": {nested}}}}}'
    body = f'{{"messages": [{{"role": "user", "content": "a"}}], "tools": [{tool}]}}'
    with contextlib.suppress(Refusal):
        openai.chat(body.encode(), model(max_model_len=100_000), id="1", seed=0, now=0)


def test_models_are_known_by_name() -> None:
    status, error = refusal("chat", model="gpt-9")
    assert (status, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert "tiny" in error["message"]
    two = model() | {"other": msgspec.structs.replace(model()["tiny"], name="other")}
    with pytest.raises(Refusal, match="tiny, other"):
        parse("completions", two, prompt="a")
    assert parse("completions", two, prompt="a", model="other").model.name == "other"
    listed = json.loads(reply.models_body(two | {"alias": two["tiny"]}))
    assert [card["id"] for card in listed["data"]] == ["tiny", "other"]
    assert json.loads(reply.model_body("other", two))["max_model_len"] == 512


def test_a_prompt_that_is_too_long_is_refused_with_the_numbers() -> None:
    models = model(max_model_len=20)
    for fields in ({"prompt": [1] * 20}, {"prompt": [1] * 15, "max_tokens": 6}):
        with pytest.raises(Refusal) as caught:
            parse("completions", models, **fields)
        error = json.loads(caught.value.body)["error"]
        assert error["code"] == "context_length_exceeded"
        assert "20 tokens" in error["message"]
        assert str(len(fields["prompt"])) in error["message"]  # type: ignore[arg-type]
    assert parse("completions", models, prompt=[1] * 15).requests[0].sampling.max_tokens == 5
    for kind, huge in (
        ("completions", {"prompt": "a" * 10_000_000}),
        ("chat", {"messages": [{"role": "user", "content": "a" * 10_000_000}]}),
    ):
        with pytest.raises(Refusal, match="10000000 characters"):
            parse(kind, models, **huge)


def test_a_model_without_tokenizer_takes_token_ids_only() -> None:
    bare = model("bare")
    assert parse("completions", bare, prompt=[1, 2]).requests[0].prompt == [1, 2]
    for kind, fields in (
        ("completions", {"prompt": "a"}),
        ("chat", {"messages": [{"role": "user", "content": "a"}]}),
    ):
        with pytest.raises(Refusal, match="token ids"):
            parse(kind, bare, **fields)
    answer = Reply(parse("completions", bare, prompt=[1], return_token_ids=True))
    answer.feed(Output("cmpl-1", 0, 0, [4, 5], "length"))
    choice = json.loads(answer.body())["choices"][0]
    assert (choice["text"], choice["token_ids"]) == ("", [4, 5])


# ---- Outputs out


def ids(transcript: str) -> list[int]:
    return text().encode(transcript)


CALLING = (
    "<|channel|>analysis<|message|>think<|end|><|start|>assistant<|channel|>commentary"
    "<|message|>wait 🦊<|end|><|start|>assistant to=functions.f"
    '<|channel|>commentary json<|message|>{"a": 1}<|call|>'
)
SAYING = "<|channel|>analysis<|message|>think<|end|><|start|>assistant<|channel|>final<|message|>"


def outputs(
    id: str, tokens: list[int], cuts: list[int], reason: FinishReason, stop: int | None = None
) -> list[Output]:
    edges = [0, *sorted({min(cut, len(tokens)) for cut in cuts} - {0, len(tokens)}), len(tokens)]
    made = [Output(id, 0, start, tokens[start:end]) for start, end in itertools.pairwise(edges)]
    made[0].cached = 16
    made[-1].reason, made[-1].stop = reason, stop
    return made


def events(raw: bytes) -> list[Any]:
    parts = raw.decode().split("\n\n")
    assert parts.pop() == ""
    assert all(part.startswith("data: ") for part in parts)
    return [
        part if part == "data: [DONE]" else json.loads(part.removeprefix("data: "))
        for part in parts
    ]


def run(call: Call, made: list[Output]) -> tuple[Reply, list[Any]]:
    answer = Reply(call)
    raw = b""
    for output in made:
        raw += answer.feed(output)
    return answer, events(raw) if raw else []


def fold_chat(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    """The message a client makes of a stream's chunks."""
    message: dict[str, Any] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            for name, value in choice["delta"].items():
                if name == "tool_calls":
                    for part in value:
                        calls = message.setdefault("tool_calls", [])
                        if part["index"] == len(calls):
                            calls.append({"id": part["id"], "type": part["type"], "function": {}})
                        function = calls[part["index"]]["function"]
                        for key, piece in part["function"].items():
                            function[key] = function.get(key, "") + piece
                else:
                    message[name] = message.get(name, "") + value
    return message


@settings(max_examples=300)
@given(
    cuts=st.lists(st.integers(0, 90), max_size=30),
    transcript=st.sampled_from(
        [CALLING, SAYING + "hello world 🦊<|return|>", "", "nonsense", SAYING]
    ),
    stop=st.sampled_from([[], ["wor"], ["🦊", "o w"], ["hello world"], ["k"]]),
    reason=st.sampled_from(["stop", "length"]),
)
def test_a_whole_body_is_the_fold_of_its_stream(
    cuts: list[int], transcript: str, stop: list[str], reason: FinishReason
) -> None:
    tokens = ids(transcript)
    if not tokens:
        cuts = []
    ended = tokens[-1] if reason == "stop" and tokens else None
    options = {"stop": stop, "return_token_ids": True, "tools": TOOLS}
    whole, nothing = run(ask(**options), outputs("chatcmpl-1", tokens, [], reason, ended))
    assert nothing == []
    body = json.loads(whole.body())
    ChatCompletion.model_validate(body, strict=False)
    call = ask(stream=True, stream_options={"include_usage": True}, **options)
    stream, sent = run(call, outputs("chatcmpl-1", tokens, cuts, reason, ended))
    assert sent.pop() == "data: [DONE]"
    for chunk in sent:
        ChatCompletionChunk.model_validate(chunk)
        assert (chunk["id"], chunk["created"], chunk["model"]) == ("chatcmpl-1", 5, "tiny")
    usage = sent.pop()
    assert usage["choices"] == []
    assert usage["usage"] == body["usage"]
    assert all(chunk["usage"] is None for chunk in sent)
    assert sent[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert sent[0]["prompt_token_ids"] == body["prompt_token_ids"] == call.requests[0].prompt
    finishes = [chunk["choices"][0]["finish_reason"] for chunk in sent]
    assert set(finishes[:-1]) <= {None}
    choice = body["choices"][0]
    assert finishes[-1] == choice["finish_reason"]
    assert sent[-1]["choices"][0].get("stop_reason") == choice.get("stop_reason")
    message = fold_chat(sent)
    if message["content"] == "" and "tool_calls" in message:
        message["content"] = None
    assert message == choice["message"]
    spoken = [i for chunk in sent for i in chunk["choices"][0].get("token_ids", [])]
    assert spoken == choice["token_ids"]
    assert body["usage"]["completion_tokens"] == len(spoken)
    matched = choice.get("stop_reason") in stop
    assert spoken == tokens[: len(spoken)] if matched else spoken == tokens
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 16}
    early = matched and len(stream.choices["chatcmpl-1"].emitted) < len(tokens)
    assert stream.aborts in ([], ["chatcmpl-1"])
    assert stream.aborts == [] or early or matched


def test_a_tool_call_as_clients_expect_it() -> None:
    tokens = ids(CALLING)
    answer, _ = run(ask(tools=TOOLS), outputs("chatcmpl-1", tokens, [], "stop", tokens[-1]))
    parsed = ChatCompletion.model_validate_json(answer.body())
    choice = parsed.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "wait 🦊"
    assert choice.message.reasoning_content == "think"  # type: ignore[attr-defined]
    assert choice.message.tool_calls
    call = choice.message.tool_calls[0]
    assert call.type == "function"
    assert (call.function.name, call.function.arguments) == ("f", '{"a": 1}')
    assert call.id.startswith("call_")


@settings(max_examples=200)
@given(cuts=st.lists(st.integers(0, 30), max_size=12), stop=st.sampled_from([None, "lo w", "d"]))
def test_completions_stream_and_whole_agree(cuts: list[int], stop: str | None) -> None:
    tokens = ids("hello world<|end|> 🦊 there<|return|>")
    options = {"stop": stop, "return_token_ids": True}
    whole, _ = run(complete(**options), outputs("cmpl-1", tokens, [], "stop", tokens[-1]))
    body = json.loads(whole.body())
    Completion.model_validate(body)
    _stream, sent = run(
        complete(stream=True, **options), outputs("cmpl-1", tokens, cuts, "stop", tokens[-1])
    )
    assert sent.pop() == "data: [DONE]"
    for chunk in sent:
        Completion.model_validate(chunk | {"choices": []})
        assert "usage" not in chunk
    choices = [chunk["choices"][0] for chunk in sent]
    choice = body["choices"][0]
    assert "".join(c["text"] for c in choices) == choice["text"]
    assert [i for c in choices for i in c.get("token_ids", [])] == choice["token_ids"]
    assert choices[0]["prompt_token_ids"] == choice["prompt_token_ids"] == ids("hello")
    assert choices[-1]["finish_reason"] == choice["finish_reason"] == "stop"
    expected = "hello world 🦊 there"
    assert choice["text"] == (expected.split(stop)[0] if stop else expected)


def test_several_prompts_share_an_answer() -> None:
    call = complete(prompt=[[1], [2], [3]], stream=True, stop="b")
    answer = Reply(call)
    a, b = text().encode_plain("a"), text().encode_plain("b")
    first, second, third = (request.id for request in call.requests)
    sent = events(answer.feed(Output(third, 0, 0, a)))
    assert sent[0]["choices"][0]["index"] == 2
    assert answer.feed(Output("stranger", 0, 0, a)) == b""
    answer.feed(Output(second, 0, 0, b))
    assert answer.aborts == [second]
    assert answer.feed(Output(second, 0, 1, a, "abort")) == b"", "the end of an aborted request"
    answer.feed(Output(first, 0, 0, a, "length"))
    assert not answer.done
    assert events(answer.feed(Output(third, 0, 1, a, "length")))[-1] == "data: [DONE]"
    assert answer.done
    assert [c.reason for c in answer.choices.values()] == ["length", "stop", "length"]


@pytest.mark.parametrize("kind", ["chat", "completions"])
def test_choices_differ_by_their_number_alone(kind: str) -> None:
    prompts = 1 if kind == "chat" else 2
    fields: dict[str, Any] = {} if kind == "chat" else {"prompt": [[1, 2], [3]]}
    call = (ask if kind == "chat" else complete)(n=3, return_token_ids=True, **fields)
    alone = (ask if kind == "chat" else complete)(return_token_ids=True, **fields).requests
    found = [
        (tuple(r.prompt), r.choice, msgspec.structs.replace(r, id="", choice=0))
        for r in call.requests
    ]
    assert found == [
        (tuple(one.prompt), choice, msgspec.structs.replace(one, id=""))
        for one in alone
        for choice in range(3)
    ]
    assert len({request.id for request in call.requests}) == 3 * prompts
    tokens = [*ids(SAYING + "hello <|return|>" if kind == "chat" else "hello ")]
    answer, stream = Reply(call), Reply(msgspec.structs.replace(call, stream=True))
    streamed: dict[int, list[int]] = {}
    for at, request in reversed([*enumerate(call.requests)]):
        mine = [*tokens, 100 + at]
        output = Output(request.id, 0, 0, mine, "length", cached=0 if request.choice == 0 else 1)
        answer.feed(output)
        for event in events(stream.feed(output)):
            for choice in [] if event == "data: [DONE]" else event["choices"]:
                streamed.setdefault(choice["index"], []).extend(choice.get("token_ids", []))
    body = json.loads(answer.body())
    assert [choice["index"] for choice in body["choices"]] == [*range(3 * prompts)]
    for at, choice in enumerate(body["choices"]):
        assert choice["token_ids"] == streamed[at] == [*tokens, 100 + at]
    usage = body["usage"]
    assert usage["prompt_tokens"] == sum(len(one.prompt) for one in alone), "once for each prompt"
    assert usage["completion_tokens"] == 3 * prompts * (len(tokens) + 1)
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0}


@pytest.mark.parametrize("stream", [False, True])
def test_an_echo_comes_before_the_text(stream: bool) -> None:
    prompts = [[*ids("say<|end|>")], ids("hello ")]
    for skip, said in ((True, "say"), (False, "say<|end|>")):
        call = complete(prompt=prompts, echo=True, n=2, stream=stream, skip_special_tokens=skip)
        answer = Reply(call)
        texts = [""] * 4
        for request in call.requests:
            raw = answer.feed(Output(request.id, 0, 0, ids("wor")))
            raw += answer.feed(Output(request.id, 0, len(ids("wor")), ids("ld"), "length"))
            for event in events(raw)[: None if request is not call.requests[-1] else -1]:
                texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
        if not stream:
            texts = [choice["text"] for choice in json.loads(answer.body())["choices"]]
        assert texts == [said + "world", said + "world", "hello world", "hello world"]


@settings(max_examples=100)
@given(cuts=st.lists(st.integers(0, 30), max_size=12), stop=st.sampled_from(["lo w", "d", "x"]))
def test_a_stop_string_may_be_shown(cuts: list[int], stop: str) -> None:
    made = outputs("cmpl-1", ids("hello world"), cuts, "length")
    answer, _ = run(complete(stop=[stop, "o w"], include_stop_str_in_output=True), made)
    choice = json.loads(answer.body())["choices"][0]
    assert choice["text"] == "hello w"
    assert choice["stop_reason"] == ("lo w" if stop == "lo w" else "o w")


def test_an_engines_failure_ends_a_stream_with_an_error() -> None:
    call = complete(prompt=[[1], [2]], stream=True)
    first, second = (request.id for request in call.requests)
    answer = Reply(call)
    answer.feed(Output(first, 0, 0, ids("a")))
    sent = events(answer.feed(Output(first, 0, 1, [], "error", "rank 1 died")))
    assert sent[-1]["error"]["message"] == "rank 1 died"
    assert sent[-1]["error"]["type"] == "server_error"
    assert answer.done
    assert answer.aborts == [second]
    assert answer.failure is not None
    assert answer.failure.status == 503
    assert answer.feed(Output(second, 0, 0, ids("a"))) == b""
    assert answer.fail(schema.unavailable("twice")) == b""


def test_what_the_engine_refuses_is_a_wrong_request() -> None:
    for stream in (False, True):
        answer = Reply(complete(stream=stream))
        sent = answer.feed(Output(answer.call.id, 0, 0, [], "refused", "it never fits"))
        assert answer.failure is not None
        assert answer.failure.status == 400
        if stream:
            (event,) = events(sent)
            assert event["error"]["type"] == "invalid_request_error"
            assert event["error"]["message"] == "it never fits"
        assert not answer.aborts, "the engine knows"


def test_a_deadline_that_passes_in_the_engine_is_the_requests_own() -> None:
    call = complete(stream=True)
    answer = Reply(call)
    late = Output(call.id, 0, 0, [], "timeout", "the deadline passed after 0 tokens")
    (sent,) = events(answer.feed(late))
    assert (sent["error"]["code"], sent["error"]["param"]) == ("timeout", None)
    assert answer.failure is not None
    assert answer.failure.status == 408
    assert not answer.aborts


def test_repeated_tokens_are_skipped_and_missing_ones_end_the_answer() -> None:
    answer = Reply(complete())
    hello = ids("hello world and all")
    answer.feed(Output("cmpl-1", 0, 0, hello[:2]))
    answer.feed(Output("cmpl-1", 1, 0, hello[:3]))
    answer.feed(Output("cmpl-1", 1, 3, hello[3:], "length"))
    assert json.loads(answer.body())["choices"][0]["text"] == "hello world and all"
    torn = Reply(complete())
    torn.feed(Output("cmpl-1", 0, 3, hello))
    assert torn.failure is not None
    assert torn.aborts == ["cmpl-1"]


def test_an_answer_goes_on_from_emitted_tokens() -> None:
    call = ask()
    tokens = ids(SAYING + "hello world")
    for cut in range(len(tokens)):
        request = msgspec.structs.replace(call.requests[0], emitted=tokens[:cut])
        resumed = Reply(msgspec.structs.replace(call, requests=(request,)))
        resumed.feed(Output(request.id, 1, cut, tokens[cut:], "length"))
        message = json.loads(resumed.body())["choices"][0]["message"]
        assert (message["content"], message["reasoning_content"]) == ("hello world", "think")


def test_a_stop_token_ends_the_text_before_it_and_is_counted() -> None:
    (x,) = text().encode_plain("x")
    tokens = [*ids("hello"), x]
    answer, _ = run(
        complete(stop_token_ids=[x], return_token_ids=True),
        outputs("cmpl-1", tokens, [], "stop", x),
    )
    body = json.loads(answer.body())
    choice = body["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("hello", "stop", x)
    assert choice["token_ids"] == tokens
    assert body["usage"]["completion_tokens"] == len(tokens)


def test_half_a_stop_string_at_the_end_is_shown() -> None:
    tokens = ids("hello world")
    made = outputs("cmpl-1", tokens, [1], "length")
    answer, sent = run(complete(stop="world!", stream=True), made)
    assert "".join(c["choices"][0]["text"] for c in sent[:-1]) == "hello world"
    assert answer.aborts == []


def client(status: int, content: bytes, stream: bool = False) -> official.OpenAI:
    """The official client with our bytes as the server's answer."""
    kind = "text/event-stream" if stream else "application/json"
    transport = httpx.MockTransport(
        lambda _: httpx.Response(status, content=content, headers={"content-type": kind})
    )
    http: Any = httpx.Client(transport=transport)
    return official.OpenAI(api_key="none", max_retries=0, http_client=http)


HELLO: list[chat_types.ChatCompletionMessageParam] = [{"role": "user", "content": "hello"}]


def test_the_official_client_reads_bodies_streams_and_errors() -> None:
    tokens = ids(CALLING)
    made = outputs("chatcmpl-1", tokens, list(range(99)), "stop", tokens[-1])
    whole, _ = run(ask(tools=TOOLS), made)
    with client(200, whole.body()) as one:
        body = one.chat.completions.create(model="tiny", messages=HELLO)
    message = body.choices[0].message
    call = ask(tools=TOOLS, stream=True, stream_options={"include_usage": True})
    streaming = Reply(call)
    raw = b"".join([streaming.feed(output) for output in made])
    with (
        client(200, raw, stream=True) as one,
        one.chat.completions.stream(model="tiny", messages=HELLO) as stream,
    ):
        final = stream.get_final_completion()
    assert final.usage == body.usage
    assert final.choices[0].finish_reason == "tool_calls"
    streamed = final.choices[0].message
    assert (streamed.content, streamed.role) == (message.content, "assistant")
    assert streamed.tool_calls
    assert message.tool_calls
    theirs, ours = streamed.tool_calls[0], message.tool_calls[0]
    assert ours.type == "function"
    assert theirs.id == ours.id
    assert theirs.function.arguments == ours.function.arguments
    again = ask(
        messages=[
            *HELLO,
            message.model_dump(),
            {"role": "tool", "tool_call_id": ours.id, "content": "sun"},
        ]
    )
    shown = text().decode(again.requests[0].prompt, False)
    assert "<|channel|>analysis<|message|>think<|end|><|start|>assistant to=functions.f" in shown

    with pytest.raises(Refusal) as caught:
        ask(model="gpt-9")
    with client(404, caught.value.body) as one, pytest.raises(official.NotFoundError) as not_found:
        one.chat.completions.create(model="gpt-9", messages=HELLO)
    assert not_found.value.code == "model_not_found"

    torn = Reply(ask(stream=True))
    raw = torn.feed(Output("chatcmpl-1", 0, 0, ids(SAYING + "hello")))
    raw += torn.feed(Output("chatcmpl-1", 0, 99, [], "error", "rank 1 died"))
    with client(200, raw, stream=True) as one:
        chunks = one.chat.completions.create(model="tiny", messages=HELLO, stream=True)
        with pytest.raises(official.APIError, match="rank 1 died"):
            list(chunks)
