"""The harmony splitter: right on valid answers, total and stable on all others."""

from __future__ import annotations

import itertools
import json
import re
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cluster.harmony import HEADER_TOKENS, Delta, Harmony, Json, Plain, render, splitter
from cluster.text import Text
from tests import vocabularies
from tests.test_openai import ask, fold_chat, outputs, run

CONTROL = re.compile(r"(<\|[a-z_0-9]+\|>)")
MANY = pytest.param(20_000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])
Fold = tuple[str, str, list[tuple[str, str]]]


@cache
def model() -> Text:
    with tempfile.TemporaryDirectory() as directory:
        return Text(vocabularies.save(Path(directory), vocabularies.byte_level()))


def ids(transcript: str) -> list[int]:
    """Token ids of a transcript in which control tokens are written by name."""
    out: list[int] = []
    for part in CONTROL.split(transcript):
        out += [model().control[part]] if part in model().control else model().encode_plain(part)
    return out


PROMPT = ids("<|start|>user<|message|>hello<|end|><|start|>assistant")


def fold(deltas: Sequence[Delta]) -> Fold:
    """(content, reasoning, calls), as a whole body has them."""
    calls: list[tuple[str, str]] = []
    for delta in deltas:
        assert delta.text or delta.name
        if delta.kind == "call":
            if delta.name:
                calls.append((delta.name, ""))
            assert delta.call == len(calls) - 1
            calls[-1] = (calls[-1][0], calls[-1][1] + delta.text)
    texts = {
        kind: "".join(delta.text for delta in deltas if delta.kind == kind)
        for kind in ("content", "reasoning")
    }
    return texts["content"], texts["reasoning"], calls


def split(
    tokens: Sequence[int],
    cuts: Sequence[int] = (),
    prompt: Sequence[int] = PROMPT,
    text: Text | None = None,
) -> Fold:
    harmony = Harmony(text or model(), prompt)
    deltas: list[Delta] = []
    edges = [0, *sorted(min(cut, len(tokens)) for cut in cuts), len(tokens)]
    for start, end in itertools.pairwise(edges):
        deltas += harmony.feed(tokens[start:end])
    return fold(deltas + harmony.finish())


ANALYSIS = "<|channel|>analysis<|message|>think hard<|end|>"
FINAL = "<|start|>assistant<|channel|>final<|message|>hello world"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (ANALYSIS + FINAL + "<|return|>", ("hello world", "think hard", [])),
        (ANALYSIS + FINAL, ("hello world", "think hard", [])),
        ("<|channel|>final<|message|>", ("", "", [])),
        (
            "<|channel|>commentary<|message|>let me look<|end|>"
            "<|start|>assistant to=functions.f<|channel|>commentary json<|message|>{}<|call|>",
            ("let me look", "", [("f", "{}")]),
        ),
        (
            "<|channel|>commentary to=functions.get_x <|constrain|>json<|message|>"
            '{"a": 1}<|call|><|start|>assistant<|channel|>commentary to=functions.g code'
            "<|message|>x<|call|>",
            ("", "", [("get_x", '{"a": 1}'), ("g", "x")]),
        ),
        (" to=functions.f<|channel|>commentary json<|message|>1<|call|>", ("", "", [("f", "1")])),
        ("<|channel|>analysis to=functions.f<|message|>1<|call|>", ("", "", [("f", "1")])),
        ("<|channel|>commentary to=f<|message|>1<|call|>", ("", "", [("f", "1")])),
        # Nothing need stand before <|constrain|>, and it may stand before the channel.
        ("<|channel|>commentary to=f<|constrain|>json<|message|>1<|call|>", ("", "", [("f", "1")])),
        (" to=f<|constrain|>json<|channel|>commentary<|message|>1<|call|>", ("", "", [("f", "1")])),
        ("<|channel|>analysis<|constrain|>json<|message|>1<|end|>", ("", "1", [])),
        ("<|channel|>final <|constrain|>json<|message|>{}<|return|>", ("{}", "", [])),
        # Built-in tools: their calls in the analysis are thoughts, no function of the client's.
        ("<|channel|>analysis to=python code<|message|>1+1<|call|>", ("", "1+1", [])),
        ("<|channel|>analysis to=browser.open code<|message|>{}<|call|>", ("", "{}", [])),
        ("<|channel|>commentary to=browser.open<|message|>{}", ("", "", [("browser.open", "{}")])),
        # Who is no function is not called.
        ("<|channel|>commentary to=all<|message|>hello<|end|>", ("hello", "", [])),
        (" to=user<|channel|>commentary<|message|>hello<|end|>", ("hello", "", [])),
        ("<|channel|>commentary to=functions.<|message|>hello<|end|>", ("hello", "", [])),
        ("<|channel|>commentary to=functions.user<|message|>1", ("", "", [("user", "1")])),
        (
            "<|channel|>commentary to=functions.f<|message|>1<|call|>"
            "<|start|>functions.f to=assistant<|channel|>commentary<|message|>hello<|end|>"
            "<|start|>assistant<|channel|>final<|message|>world",
            ("hello\nworld", "", [("f", "1")]),
        ),
        # The role may be said again.
        ("assistant<|channel|>final<|message|>a", ("a", "", [])),
        ("assistant to=functions.f<|channel|>commentary<|message|>1", ("", "", [("f", "1")])),
        ("assistants say hello", ("assistants say hello", "", [])),
        # Nonsense becomes content.
        ("hello world", ("hello world", "", [])),
        ("hello<|return|>", ("hello", "", [])),
        ("<|message|>hello", ("hello", "", [])),
        ("<|channel|>mumble<|message|>hello", ("hello", "", [])),
        ("<|channel|>final<|message|>a<|message|>b<|constrain|>c<|reserved_1|>d", ("abcd", "", [])),
        ("<|channel|>analysis<|message|>a<|channel|>final<|message|>b", ("b", "a", [])),
        ("<|channel|>final<|message|>a<|end|>hello", ("a\nhello", "", [])),
        ("<|channel|>final<|message|>a<|end|><|channel|>final<|message|>b", ("a\nb", "", [])),
        ("<|channel|>final<|message|>a<|end|><|end|><|start|><|start|>", ("a", "", [])),
        ("<|start|>assistant<|channel|>final<|message|>a", ("a", "", [])),
        ("<|endoftext|>", ("", "", [])),
        # A header that breaks off is not shown.
        ("<|channel|>fin", ("", "", [])),
        (ANALYSIS + "<|start|>assist", ("", "think hard", [])),
        (ANALYSIS + "<|start|>assistant to=functions.get", ("", "think hard", [])),
        (" to=functions.get", ("", "", [])),
        # Text that spells a control token by other tokens is text.
        ("<|channel|>final<|message|><" + "|start" + "|x>", ("<|start|x>", "", [])),
    ],
)
def test_answers(answer: str, expected: Fold) -> None:
    tokens = ids(answer)
    assert split(tokens) == expected
    assert split(tokens, range(len(tokens))) == expected


@pytest.mark.parametrize(
    ("prompt", "answer", "expected"),
    [
        ("<|start|>assistant<|channel|>final<|message|>", "hello", ("hello", "", [])),
        ("<|start|>assistant<|channel|>final<|message|>he", "llo", ("llo", "", [])),
        ("<|start|>assistant<|channel|>", "final<|message|>a", ("a", "", [])),
        ("<|start|>assistant<|channel|>", "final", ("", "", [])),
        (
            "<|start|>assistant<|channel|>commentary to=functions.f json<|message|>",
            "{}<|call|>",
            ("", "", [("f", "{}")]),
        ),
        ("<|start|>assistant to=functions.f", "<|channel|>x<|message|>1", ("", "", [("f", "1")])),
        ("<|start|>user<|message|>hello<|end|>", "<|start|>a<|message|>b", ("b", "", [])),
        ("no control token", "<|channel|>final<|message|>a", ("a", "", [])),
        ("", "hello", ("hello", "", [])),
    ],
)
def test_the_answer_goes_on_where_the_prompt_ends(prompt: str, answer: str, expected: Fold) -> None:
    assert split(ids(answer), prompt=ids(prompt)) == expected
    assert split(ids(answer), range(99), prompt=ids(prompt)) == expected


def test_a_header_without_end_becomes_content() -> None:
    words = "hello " * (HEADER_TOKENS + 10)
    for prefix in ("", "<|start|>"):
        tokens = ids(prefix + words)
        content, reasoning, calls = split(tokens)
        assert content.strip() == words.strip()
        assert (reasoning, calls) == ("", [])
        harmony = Harmony(model(), PROMPT)
        shown = [delta for token in tokens for delta in harmony.feed([token])]
        assert shown, "content is not held back for ever"


def test_an_answer_without_header_is_shown_at_once() -> None:
    harmony = Harmony(model(), PROMPT)
    first, *rest = ids("hello world")
    assert harmony.feed([first]) == [Delta("content", model().decode([first]))]
    assert fold([*harmony.feed(rest), *harmony.finish()])[0] == model().decode(rest)


def test_half_characters_are_held_and_end_with_their_message() -> None:
    fox = ids("🦊")
    assert len(fox) > 1
    harmony = Harmony(model(), PROMPT)
    harmony.feed(ids("<|channel|>analysis<|message|>"))
    assert harmony.feed(fox[:-1]) == []
    assert harmony.feed(fox[-1:]) == [Delta("reasoning", "🦊")]
    assert harmony.feed(fox[:1]) == []
    assert [d.kind for d in harmony.feed(ids("<|end|>"))] == ["reasoning"]
    harmony.feed(ids(FINAL))
    harmony.feed(fox[:1])
    assert harmony.finish() == [Delta("content", "\ufffd")]


PIECES = st.one_of(
    st.sampled_from(vocabularies.HARMONY).map(ids),
    st.sampled_from(
        ["assistant", "user", "analysis", "final", "commentary", " to=functions.f", " to=", " json",
         "functions.g", "hello", " world", "🦊", "{}", "\n", " "]
    ).map(ids),
    st.lists(st.integers(0, 450), max_size=4),
)  # fmt: skip
ANSWERS = st.lists(PIECES, max_size=14).map(lambda parts: [i for part in parts for i in part])


VALID = [
    ANALYSIS + FINAL + "<|return|>",
    "<|channel|>commentary<|message|>wait<|end|><|start|>assistant to=functions.f"
    '<|channel|>commentary json<|message|>{"a": 1}<|call|><|start|>functions.f to=assistant'
    "<|channel|>commentary<|message|>2<|end|><|start|>assistant" + ANALYSIS + FINAL + "<|end|>",
    '<|channel|>commentary to=functions.g <|constrain|>json<|message|>{"b": "🦊"}<|call|>'
    "<|start|>assistant<|channel|>analysis to=python code<|message|>1+1<|call|>" + FINAL,
]


@st.composite
def mutations(draw: st.DrawFn) -> list[int]:
    """A valid answer with tokens dropped, doubled, swapped and put in, or cut off."""
    tokens = ids(draw(st.sampled_from(VALID)))
    controls = st.sampled_from(sorted(model().control.values()))
    for edit in draw(st.lists(st.sampled_from(["drop", "double", "swap", "put", "cut"]))):
        at = draw(st.integers(0, len(tokens) - 1))
        if edit == "drop":
            del tokens[at]
        elif edit == "double":
            tokens.insert(at, tokens[at])
        elif edit == "swap":
            tokens[at - 1], tokens[at] = tokens[at], tokens[at - 1]
        elif edit == "put":
            tokens.insert(at, draw(controls))
        else:
            del tokens[at:]
        if not tokens:
            break
    return tokens


def messages(tokens: Sequence[int]) -> list[str]:
    """The texts that <|message|> opens, however wrong their headers are."""
    names = {token: name for name, token in model().control.items()}
    texts: list[list[int]] = []
    inside = False
    for token in tokens:
        name = names.get(token, "")
        if name == "<|message|>" and not inside:
            inside = True
            texts.append([])
        elif name in ("<|end|>", "<|return|>", "<|call|>", "<|start|>", "<|channel|>"):
            inside = False
        elif inside and not name:
            texts[-1].append(token)
    return [model().decode(text) for text in texts]


def agrees(tokens: list[int], cuts: list[int], prompt: list[int]) -> None:
    whole = split(tokens, prompt=prompt)
    assert whole == split(tokens, cuts, prompt) == split(tokens, range(len(tokens)), prompt)
    content, reasoning, calls = whole
    shown = [content, reasoning, *itertools.chain.from_iterable(calls)]
    # Only text that plain tokens spell themselves may look like a control token.
    spelled = model().decode([i for i in tokens if i not in model().control.values()])
    for name in model().control:
        assert sum(text.count(name) for text in shown) <= spelled.count(name)
    if prompt == PROMPT:
        for text in messages(tokens):
            # Bytes at its edges may have become a character with their neighbours.
            inner = text.strip("\ufffd")
            assert any(inner in each for each in shown), "what was said is shown"


def streams_as_a_whole(tokens: list[int], cuts: list[int]) -> None:
    """The same through ``Reply``: the fold of a stream's events is the whole body."""
    if not tokens:
        return
    made = [outputs("chatcmpl-1", tokens, at, "length") for at in ([], cuts, [*range(len(tokens))])]
    whole, _ = run(ask(), made[0])
    body = json.loads(whole.body())["choices"][0]
    for each in made[1:]:
        _, sent = run(ask(stream=True), each)
        message = fold_chat(sent[:-1])
        if message["content"] == "" and "tool_calls" in message:
            message["content"] = None
        assert message == body["message"]
        assert sent[-2]["choices"][0]["finish_reason"] == body["finish_reason"]


CUTS = st.lists(st.integers(0, 90), max_size=8)


@pytest.mark.parametrize("count", [1000, MANY])
def test_any_tokens_give_the_same_however_they_are_cut_and_leak_nothing(count: int) -> None:
    @settings(max_examples=count)
    @given(tokens=ANSWERS, cuts=CUTS, prompt=st.one_of(st.just(PROMPT), ANSWERS))
    @example(tokens=[], cuts=[], prompt=[])
    def check(tokens: list[int], cuts: list[int], prompt: list[int]) -> None:
        agrees(tokens, cuts, prompt)
        streams_as_a_whole(tokens, cuts)

    check()


@pytest.mark.parametrize("count", [1000, MANY])
def test_mutations_of_valid_answers_too(count: int) -> None:
    @settings(max_examples=count)
    @given(tokens=mutations(), cuts=CUTS)
    def check(tokens: list[int], cuts: list[int]) -> None:
        agrees(tokens, cuts, PROMPT)
        streams_as_a_whole(tokens, cuts)

    check()


MESSAGES = st.lists(
    st.tuples(
        st.sampled_from(["analysis", "final", "commentary", "call"]),
        st.text("hello world{}\n🦊é", min_size=1, max_size=12),
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=1000)
@given(messages=MESSAGES, cuts=st.lists(st.integers(0, 80), max_size=8))
def test_valid_answers_come_back_message_by_message(
    messages: list[tuple[str, str]], cuts: list[int]
) -> None:
    tokens: list[int] = []
    for at, (kind, words) in enumerate(messages):
        head = "<|start|>assistant" if at else ""
        if kind == "call":
            head += f"<|channel|>commentary to=functions.f{at} <|constrain|>json"
        else:
            head += f"<|channel|>{kind}"
        tokens += ids(head + "<|message|>") + model().encode_plain(words)
        tokens += ids("<|call|>" if kind == "call" else "<|end|>")
    content = "\n".join(w for kind, w in messages if kind in ("final", "commentary"))
    reasoning = "\n".join(w for kind, w in messages if kind == "analysis")
    calls = [(f"f{at}", w) for at, (kind, w) in enumerate(messages) if kind == "call"]
    assert split(tokens, cuts) == (content, reasoning, calls)


def test_a_model_without_channels_says_everything() -> None:
    with tempfile.TemporaryDirectory() as directory:
        text = Text(vocabularies.save(Path(directory), vocabularies.byte_fallback()))
    tokens = text.encode_plain("hello 你 world 🦊")
    plain = splitter(text, [])
    assert isinstance(plain, Plain)
    deltas = [delta for token in tokens for delta in plain.feed([token])] + plain.finish()
    assert fold(deltas) == (text.decode(tokens), "", [])
    assert isinstance(splitter(model(), PROMPT), Harmony)
    with tempfile.TemporaryDirectory() as directory:
        assert isinstance(splitter(Text(directory), [1]), Plain)


def test_calls_at_once_are_shown_one_by_one_with_their_results() -> None:
    with tempfile.TemporaryDirectory() as directory:
        template = vocabularies.HARMONY_TEMPLATE
        text = Text(vocabularies.save(Path(directory), vocabularies.byte_level(), template))
    calls = [{"id": name, "function": {"name": name, "arguments": {}}} for name in "ab"]
    results: list[Json] = [{"role": "tool", "tool_call_id": name, "content": name} for name in "ba"]
    together: Json = {"role": "assistant", "thinking": "hm", "tool_calls": calls}
    apart: list[Json] = [
        {"role": "assistant", "thinking": "hm", "tool_calls": calls[:1]},
        results[1],
        {"role": "assistant", "tool_calls": calls[1:]},
        results[0],
    ]
    assert render(text, [together, *results]) == text.render(apart)


def test_calls_of_one_answer_are_told_apart_in_a_stream() -> None:
    """As OpenAI streams them: index, id and name come first and once, then the arguments."""
    tokens = ids(
        "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|><|start|>"
        'assistant<|channel|>commentary to=functions.g json<|message|>{"a": 1}<|call|>'
    )
    for cuts in ([], [*range(len(tokens))]):
        _, sent = run(ask(stream=True), outputs("chatcmpl-1", tokens, cuts, "stop", tokens[-1]))
        deltas = [chunk["choices"][0]["delta"] for chunk in sent[:-1]]
        parts = [part for delta in deltas for part in delta.get("tool_calls", [])]
        assert [part["index"] for part in parts] == sorted(part["index"] for part in parts)
        assert len({part["id"] for part in parts if "id" in part}) == 2
        for index, name, arguments in ((0, "f", "{}"), (1, "g", '{"a": 1}')):
            first, *rest = [part for part in parts if part["index"] == index]
            assert first["id"]
            assert first["type"] == "function"
            assert first["function"]["name"] == name
            assert all(part.keys() == {"index", "function"} for part in rest)
            assert all(part["function"].keys() == {"arguments"} for part in rest)
            pieces = [part["function"]["arguments"] for part in (first, *rest)]
            assert "".join(pieces) == arguments
        assert sent[-2]["choices"][0]["finish_reason"] == "tool_calls"
