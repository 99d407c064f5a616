"""The harmony splitter: right on valid answers, total and stable on all others."""

from __future__ import annotations

import itertools
import re
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cluster.harmony import HEADER_TOKENS, Delta, Harmony, Plain, splitter
from cluster.text import Text
from tests import vocabularies

CONTROL = re.compile(r"(<\|[a-z_0-9]+\|>)")
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


def split(tokens: Sequence[int], cuts: Sequence[int] = (), prompt: Sequence[int] = PROMPT) -> Fold:
    harmony = Harmony(model(), prompt)
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
        ("<|channel|>analysis to=python code<|message|>1+1<|call|>", ("", "1+1", [])),
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


@settings(max_examples=3000, deadline=None)
@given(tokens=ANSWERS, cuts=st.lists(st.integers(0, 60), max_size=8), prompt=ANSWERS)
@example(tokens=[], cuts=[], prompt=[])
def test_any_tokens_give_the_same_deltas_however_they_are_cut(
    tokens: list[int], cuts: list[int], prompt: list[int]
) -> None:
    for before in (PROMPT, prompt):
        whole = split(tokens, prompt=before)
        assert whole == split(tokens, cuts, before) == split(tokens, range(len(tokens)), before)


@settings(max_examples=2000, deadline=None)
@given(tokens=ANSWERS)
def test_no_control_token_is_ever_shown(tokens: list[int]) -> None:
    content, reasoning, calls = split(tokens)
    plain = [i for i in tokens if i not in model().control.values()]
    spelled = model().decode(plain)
    shown = content + reasoning + "".join(name + arguments for name, arguments in calls)
    for name in model().control:
        # Only text that plain tokens spell themselves may look like one.
        assert shown.count(name) <= spelled.count(name)


MESSAGES = st.lists(
    st.tuples(
        st.sampled_from(["analysis", "final", "commentary", "call"]),
        st.text("hello world{}\n🦊é", min_size=1, max_size=12),
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=1000, deadline=None)
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


@settings(max_examples=1000, deadline=None)
@given(
    edits=st.lists(
        st.tuples(st.sampled_from(["drop", "double", "swap"]), st.integers(0, 60)), max_size=4
    ),
    cuts=st.lists(st.integers(0, 80), max_size=6),
)
def test_mutations_of_a_valid_answer_leak_nothing(
    edits: list[tuple[str, int]], cuts: list[int]
) -> None:
    tokens = ids(ANALYSIS + FINAL + "<|return|>")
    for edit, where in edits:
        at = where % len(tokens)
        if edit == "drop":
            del tokens[at]
        elif edit == "double":
            tokens.insert(at, tokens[at])
        else:
            tokens[at - 1], tokens[at] = tokens[at], tokens[at - 1]
        if not tokens:
            return
    result = split(tokens, cuts)
    assert result == split(tokens)
    assert "<|" not in "".join(result[:2])


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
