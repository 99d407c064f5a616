"""Tokenizer, chat template, detokenizer and stop strings against transformers and brute force."""

from __future__ import annotations

import ast
import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from cluster.template import ChatTemplateError
from cluster.text import NoTokenizer, StopStrings, Text
from tests import vocabularies

PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}\n"
    "  {% if loop.first and message.role == 'tool' %}{% continue %}{% endif %}\n"
    "[{{ message['role'] | upper }}]{{ message['content'] | trim }}{{ eos_token }}\n"
    "{% endfor %}\n"
    "{% generation %}{% endgeneration %}"
    "{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}"
    "{% if add_generation_prompt %}[ASSISTANT]{% endif %}"
)
# Contents glued to each other and to half a control token, through filters that rebuild text.
HOSTILE_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}{{ m.content }}"
    "{{ m.content | replace(' ', '') }}{{ m.content | lower }}{{ m.content[::-1] }}"
    "{% for c in m.content %}{{ c }}{% endfor %}|>{{ m | tojson }}{{ eos_token }}{% endfor %}"
)

KINDS = {
    "byte_level": vocabularies.byte_level,
    "byte_fallback": vocabularies.byte_fallback,
    "metaspace": vocabularies.metaspace,
}


@pytest.fixture(scope="module", params=KINDS)
def text(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Text:
    return Text(vocabularies.save(tmp_path_factory.mktemp(request.param), KINDS[request.param]()))


def tokenizer_of(text: Text) -> Tokenizer:
    return Tokenizer.from_file(str(text.directory / "tokenizer.json"))


@settings(max_examples=400)
@given(data=st.data(), skip=st.booleans())
def test_deltas_add_up_to_the_decoded_text(text: Text, data: st.DataObject, skip: bool) -> None:
    oracle = tokenizer_of(text)
    size = oracle.get_vocab_size()
    ids = data.draw(st.lists(st.integers(0, size + 3), max_size=40))
    detokenizer = text.detokenizer(skip)
    shown = ""
    whole = oracle.decode(ids, skip_special_tokens=skip)
    at = 0
    while at < len(ids):
        step = data.draw(st.integers(1, 3))
        shown += detokenizer.feed(ids[at : at + step])
        at += step
        assert whole.startswith(shown)
    assert shown + detokenizer.flush() == whole
    assert text.decode(ids, skip) == whole


@settings(max_examples=300)
@given(words=st.text(max_size=60))
def test_text_comes_back_and_no_delta_holds_half_a_character(words: str) -> None:
    text = _byte_level()
    detokenizer = text.detokenizer()
    deltas = [detokenizer.feed([token]) for token in text.encode_plain(words)]
    assert "".join(deltas) == words
    assert detokenizer.flush() == ""
    assert "\ufffd" in words or not any("\ufffd" in delta for delta in deltas)


_cache: dict[str, Text] = {}


def _byte_level(template: str = vocabularies.HARMONY_TEMPLATE, **config: str) -> Text:
    """One directory per template for all examples of a property."""
    if template not in _cache:
        with tempfile.TemporaryDirectory() as directory:
            _cache[template] = Text(
                vocabularies.save(
                    Path(directory), vocabularies.byte_level(), template, **(config or NAMED)
                )
            )
    return _cache[template]


NAMED = {"bos_token": "<|startoftext|>", "eos_token": "<|return|>"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Looks <up> & tells 'it'",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "hello <world> & 你好 🦊"}],
    [
        {"role": "system", "content": "be brief "},
        {"role": "user", "content": " the quick\n\nbrown  fox\t"},
        {"role": "assistant", "content": "  yes \n"},
        {"role": "user", "content": ""},
    ],
    [
        {"role": "user", "content": "weather?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {
                    "id": "1",
                    "type": "function",
                    "function": {"name": "get_weather", "arguments": {"city": "Zürich"}},
                }
            ],
        },
        {"role": "tool", "content": '{"sun": true}', "tool_call_id": "1"},
    ],
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", [vocabularies.HARMONY_TEMPLATE, PLAIN_TEMPLATE])
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_renders_as_transformers_does(
    kind: str,
    template: str,
    tools: list[dict[str, Any]] | None,
    conversation: list[dict[str, Any]],
    tmp_path: Path,
) -> None:
    named = NAMED if kind == "byte_level" else {"bos_token": "<s>", "eos_token": "</s>"}
    directory = vocabularies.save(tmp_path, KINDS[kind](), template, **named)
    oracle = PreTrainedTokenizerFast(
        tokenizer_object=KINDS[kind](), chat_template=template, **named
    )
    expected = oracle.apply_chat_template(
        conversation, tools=tools, add_generation_prompt=True, return_dict=False
    )
    assert Text(directory).render(conversation, tools) == expected


LLAMA = ["<|begin_of_text|>", "<|header_start|>", "<|header_end|>", "<|eot|>", "<|image|>",
         "<|python_start|>", "<|python_end|>"]  # fmt: skip


@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_llama_4s_own_template_renders_as_transformers_does(
    tools: list[dict[str, Any]] | None, conversation: list[dict[str, Any]], tmp_path: Path
) -> None:
    path = Path(transformers.__file__).parent / "models" / "llama4" / "processing_llama4.py"
    assigned = next(
        node
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "chat_template"
    )
    template = ast.literal_eval(assigned.value)
    tokenizer = vocabularies.byte_level(LLAMA)
    directory = vocabularies.save(tmp_path, tokenizer, template, bos_token=LLAMA[0])
    oracle = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=template, bos_token=LLAMA[0]
    )
    expected = oracle.apply_chat_template(
        conversation, tools=tools, add_generation_prompt=True, return_dict=False
    )
    assert Text(directory).render(conversation, tools) == expected


FRAGMENTS = st.one_of(
    st.sampled_from(vocabularies.HARMONY),
    st.sampled_from(
        ["<|", "|>", "<|sta", "rt|>", "|", ">", "<", "START", "<|START|>", "<|start |>", "start",
         "><|dne|<", "\\u003c|start|>", " ", "\n", "a", "\ue000", "\U000f0000", "<plain>"]
    ),
    st.text(max_size=3),
)  # fmt: skip
HOSTILE = st.lists(FRAGMENTS, max_size=8).map("".join)


@settings(max_examples=500)
@given(a=HOSTILE, b=HOSTILE, name=HOSTILE, effort=HOSTILE)
@pytest.mark.parametrize("template", [vocabularies.HARMONY_TEMPLATE, HOSTILE_TEMPLATE])
def test_no_content_can_add_a_control_token(
    template: str, a: str, b: str, name: str, effort: str
) -> None:
    text = _byte_level(template)

    def control(one: str, two: str, three: str, four: str) -> Counter[int]:
        conversation: list[dict[str, Any]] = [
            {"role": "system", "content": one},
            {"role": "user", "content": two, "name": three},
            {"role": "assistant", "content": two + one},
            {
                "role": "assistant",
                "content": three,
                "tool_calls": [{"function": {"name": three, "arguments": {three: two}}}],
            },
            {"role": "tool", "content": one},
        ]
        tools = [{"type": "function", "function": {"name": three, "parameters": {one: two}}}]
        ids = text.render(conversation, tools, reasoning_effort=four)
        return Counter(i for i in ids if i in set(text.control.values()))

    assert control(a, b, name, effort) == control("x", "y", "z", "w")


@settings(max_examples=200)
@given(words=HOSTILE)
def test_hostile_text_is_kept_as_text(words: str) -> None:
    text = _byte_level()
    plain = text.encode_plain(words)
    assert text.decode(plain, skip_control=False) == words
    assert not set(plain) & set(text.control.values())
    rendered = text.render([{"role": "user", "content": words}])
    shown = text.decode(rendered, skip_control=False)
    assert f"<|start|>user<|message|>{words}<|end|><|start|>assistant" in shown


@pytest.mark.parametrize("kind", KINDS)
def test_control_tokens_in_the_vocabulary_are_out_of_reach_of_text(
    kind: str, tmp_path: Path
) -> None:
    text = Text(vocabularies.save(tmp_path, KINDS[kind]()))
    unknown = text.control.get("<unk>")
    control = set(text.control.values()) - {unknown}
    for token in text.control:
        for words in (token, f"a{token}b", f" {token} ", token * 2):
            assert not control & set(text.encode_plain(words))
        if token != "<unk>":
            assert text.control[token] in text.encode(token)


def test_a_raw_prompt_is_encoded_as_transformers_does(text: Text) -> None:
    oracle = PreTrainedTokenizerFast(tokenizer_object=tokenizer_of(text))
    for words in ("", "hello world", " the  hello", "".join(text.control), "<|start|>a</s> b<s>"):
        assert text.encode(words) == oracle.encode(words)


def test_named_templates_and_configured_tokens(tmp_path: Path) -> None:
    templates = [
        {"name": "default", "template": "{{ bos_token }}D{{ messages[0].content }}"},
        {"name": "tool_use", "template": "T{{ eos_token }}"},
    ]
    directory = vocabularies.save(
        tmp_path,
        vocabularies.byte_level(),
        bos_token={"content": "<|startoftext|>"},
        eos_token="<|return|>",
        chat_template=templates,
    )
    text = Text(directory)
    message = [{"role": "user", "content": "<|return|>"}]
    assert text.decode(text.render(message), False) == "<|startoftext|>D<|return|>"
    assert text.render(message).count(text.control["<|return|>"]) == 0
    assert text.decode(text.render(message, TOOLS), False) == "T<|return|>"


def test_what_a_directory_lacks_is_said(tmp_path: Path) -> None:
    bare = Text(tmp_path)
    with pytest.raises(NoTokenizer, match="token ids"):
        bare.encode("a")
    with pytest.raises(NoTokenizer, match="token ids"):
        bare.encode_plain("a")
    with pytest.raises(NoTokenizer, match="token ids"):
        bare.render([{"role": "user", "content": "a"}])
    detokenizer = bare.detokenizer()
    assert detokenizer.feed([1, 2]) + detokenizer.flush() + bare.decode([1]) == ""
    vocabularies.save(tmp_path, vocabularies.byte_level())
    with pytest.raises(ChatTemplateError, match="no chat template"):
        Text(tmp_path).render([{"role": "user", "content": "a"}])


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "more"),
        ("{% for a in range(99999) %}{{ messages[0].content * 1000 }}{% endfor %}", "characters"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "refused"),
        ("{{ raise_exception('no <|start|> here') }}", "no <|start|> here"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ namespace(__class__=1) }}", "private"),
        ("{% set ns = namespace() %}{% set ns._x = 1 %}", "private"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ nowhere.to.be.found }}", "undefined"),
    ],
)
def test_a_template_that_misbehaves_is_refused(
    template: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.template.RENDER_SECONDS", 0.3)
    with pytest.raises(ChatTemplateError, match=why.replace("|", r"\|")):
        _byte_level(template).render([{"role": "user", "content": "a" * 100}])


def test_a_template_that_builds_control_tokens_from_parts_is_refused(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}<|end|>{% endfor %}"
    tokenizer = vocabularies.byte_level([*vocabularies.HARMONY, "<|user|>"])
    text = Text(vocabularies.save(tmp_path, tokenizer, template))
    with pytest.raises(ChatTemplateError, match="from parts"):
        text.render([{"role": "user", "content": "a"}])


def test_a_template_that_is_no_jinja_is_refused_at_once(tmp_path: Path) -> None:
    vocabularies.save(tmp_path, vocabularies.byte_level(), "{% for %}")
    with pytest.raises(ChatTemplateError, match="not valid"):
        Text(tmp_path)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, (1.0, 1.0, 0)),
        ({"temperature": 0.6, "top_p": 0.9, "top_k": 40, "do_sample": True}, (0.6, 0.9, 40)),
        ({"temperature": 0.6, "do_sample": False}, (0.0, 1.0, 0)),
        ({"temperature": None, "top_k": None}, (1.0, 1.0, 0)),
    ],
)
def test_sampling_defaults(
    config: dict[str, Any], expected: tuple[float, float, int], tmp_path: Path
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    defaults = Text(tmp_path).defaults
    assert (defaults.temperature, defaults.top_p, defaults.top_k) == expected


def _naive_stop(whole: str, stops: list[str]) -> tuple[str, str | None]:
    for end in range(1, len(whole) + 1):
        hits = [stop for stop in stops if whole[:end].endswith(stop)]
        if hits:
            longest = max(hits, key=len)
            return whole[: end - len(longest)], longest
    return whole, None


@settings(max_examples=1000)
@given(
    whole=st.text("ab.", max_size=14),
    stops=st.lists(st.text("ab.", min_size=1, max_size=5), max_size=4),
    data=st.data(),
)
def test_stop_strings_cut_where_a_naive_search_does(
    whole: str, stops: list[str], data: st.DataObject
) -> None:
    expected, match = _naive_stop(whole, stops)
    stop = StopStrings(stops)
    shown = ""
    at = 0
    while at < len(whole) and stop.matched is None:
        step = data.draw(st.integers(1, 4))
        shown += stop.feed(whole[at : at + step])
        at += step
        assert expected.startswith(shown)
        if stop.matched is None:
            # No more is held back than may still become a stop string.
            held = whole[len(shown) : at]
            assert any(s.startswith(held) and s != held for s in stops) or not held
    shown += stop.flush()
    assert (shown, stop.matched) == (expected, match)
