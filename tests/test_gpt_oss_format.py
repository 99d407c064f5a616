"""gpt-oss's real vocabulary and chat template: openai-harmony is the oracle, for ids, for rendering
and for splitting. `make vocabulary` fetches what the tests read."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import openai_harmony as official
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cluster.harmony import render
from cluster.text import Text
from tests import vocabularies
from tests.test_harmony import MANY, Fold, split

CONTROL_NAMES = ("startoftext", "endoftext", "return", "constrain", "channel", "start", "end")
CONTROL = [f"<|{name}|>" for name in (*CONTROL_NAMES, "message", "call", "endofprompt")]


@pytest.fixture(scope="session")
def text() -> Text:
    vocabularies.require()
    return Text(vocabularies.GPT_OSS)


@pytest.fixture(scope="session")
def oracle(text: Text) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_ENCODINGS_BASE", str(vocabularies.GPT_OSS))
        yield official.load_harmony_encoding("HarmonyGptOss")


# Ids


WORDS = st.one_of(
    st.text(max_size=40),
    st.text("  \n\t.,'1234567890aB你好éñ🦊\u200d\u0301<|>", max_size=40),
    st.lists(
        st.sampled_from([*CONTROL, "<|", "|>", "start", " to=", "functions.f", "\n\n", "word"]),
        max_size=8,
    ).map("".join),
)


@settings(max_examples=1500)
@given(words=WORDS)
@example(words="Hello world café 你好 12345")
def test_text_has_the_same_ids(text: Text, oracle: Any, words: str) -> None:
    ids = oracle.encode(words, disallowed_special=())
    assert text.encode_plain(words) == ids
    assert text.decode(ids) == words


@settings(max_examples=1500)
@given(ids=st.lists(st.integers(0, 199_997), max_size=30), cuts=st.integers(1, 5))
def test_ids_have_the_same_text(text: Text, oracle: Any, ids: list[int], cuts: int) -> None:
    detokenizer = text.detokenizer()
    shown = [detokenizer.feed(ids[at : at + cuts]) for at in range(0, len(ids), cuts)]
    assert "".join([*shown, detokenizer.flush()]) == oracle.decode(ids) == text.decode(ids)


def test_control_tokens_have_the_same_ids(text: Text, oracle: Any) -> None:
    for name in text.control:
        if name != "<|endofprompt|>":  # which harmony has reserved
            assert [text.control[name]] == oracle.encode(name, allowed_special="all")
    for reserved in range(200_000, 201_088):
        assert text.decode([reserved]) == "", "ids without text are legal and say nothing"


# Answers


def parts(oracle: Any, transcript: str) -> list[int]:
    ids: list[int] = oracle.encode(transcript, allowed_special="all")
    return ids


NAMES = st.from_regex(r"[A-Za-z0-9_-]{1,20}", fullmatch=True).filter(lambda n: n != "all")
RECIPIENTS = st.one_of(
    st.none(),
    NAMES.map("functions.".__add__),
    st.sampled_from(["python", "browser.search", "browser.open"]),
)
TYPES = st.sampled_from(["", " json", " code", " <|constrain|>json", "<|constrain|>json"])
MESSAGES = st.lists(
    st.tuples(
        st.sampled_from(["analysis", "commentary", "final"]),
        RECIPIENTS,
        TYPES,
        st.booleans(),  # the recipient stands before the channel
        st.one_of(WORDS, st.just('{"city": "Zürich"}')),
    ),
    min_size=1,
    max_size=4,
)


def transcript(messages: Any, oracle: Any) -> list[int]:
    """Ids of messages in the ways in which gpt-oss writes their headers, up to their end."""
    ids: list[int] = []
    for at, (channel, recipient, kind, before, words) in enumerate(messages):
        to = f" to={recipient}" if recipient else ""
        head = "<|start|>assistant" if at else ""
        if not recipient:
            kind = kind if "<" in kind else ""  # a bare word there would be a recipient
        head += f"{to}<|channel|>{channel}{kind}" if before else f"<|channel|>{channel}{to}{kind}"
        ids += parts(oracle, head + "<|message|>")
        ids += oracle.encode(words, disallowed_special=())
        ids += parts(oracle, "<|call|>" if recipient else "<|end|>")
    return ids


def official_fold(oracle: Any, ids: Sequence[int]) -> Fold:
    """What openai-harmony reads, as moeray's API shows it."""
    calls: list[tuple[str, str]] = []
    said: dict[str, list[str]] = {"content": [], "reasoning": []}
    for message in oracle.parse_messages_from_completion_tokens(ids, official.Role.ASSISTANT):
        (words,) = [part.text for part in message.content] or [""]
        recipient = message.recipient or ""
        if recipient.startswith("<|constrain|>"):  # a type without a recipient is taken for one
            recipient = ""
        called = recipient.removeprefix("functions.")
        if called and (called != recipient or message.channel == "commentary"):
            calls.append((called, words))
        else:
            said["reasoning" if message.channel == "analysis" else "content"].append(words)
    return (
        "\n".join(filter(None, said["content"])),
        "\n".join(filter(None, said["reasoning"])),
        calls,
    )


@pytest.mark.parametrize("count", [800, MANY])
def test_answers_are_read_as_openai_reads_them(text: Text, oracle: Any, count: int) -> None:
    prompt = parts(oracle, "<|start|>user<|message|>x<|end|><|start|>assistant")

    @settings(max_examples=count)
    @given(messages=MESSAGES, cut=st.integers(0, 200))
    def check(messages: Any, cut: int) -> None:
        ids = transcript(messages, oracle)
        expected = official_fold(oracle, ids)
        assert split(ids, (), prompt, text) == expected
        assert split(ids, range(len(ids)), prompt, text) == expected
        assert split(ids, [cut], prompt, text) == expected

    check()


# Prompts

EFFORTS = {
    "low": official.ReasoningEffort.LOW,
    "medium": official.ReasoningEffort.MEDIUM,
    "high": official.ReasoningEffort.HIGH,
}
# The template takes a message's text as it is; only empty instructions are none.
SAID = WORDS.filter(bool)
FUNCTIONS = st.lists(
    st.tuples(
        NAMES,
        st.text("abc .<|>é", min_size=1, max_size=12),
        st.dictionaries(
            st.from_regex(r"[a-z_]{1,8}", fullmatch=True),
            st.fixed_dictionaries(
                {"type": st.sampled_from(["string", "number", "integer", "boolean"])},
                optional={"description": st.text("abc .<|>é", min_size=1, max_size=12)},
            )
            | st.sampled_from(
                [
                    {"type": "array", "items": {"type": "string"}},
                    {"type": "array", "items": {"type": "integer"}, "description": "some"},
                    {"type": "string", "enum": ["a", "b"], "description": "one\nof"},
                    {"type": ["string", "null"]},
                    {"anyOf": [{"type": "string"}, {"type": "number"}]},
                ]
            ),
            max_size=3,
        ),
        st.booleans(),
    ),
    max_size=3,
)
ARGUMENTS = st.dictionaries(WORDS, st.one_of(WORDS, st.integers(-9, 9), st.none()), max_size=2)
CALL = st.tuples(NAMES, ARGUMENTS, WORDS)
LOOP = st.tuples(
    st.sampled_from(["thinking", "content", "both", "neither"]),
    SAID,
    st.lists(CALL, min_size=1, max_size=3),
)
TURN = st.tuples(SAID, st.lists(LOOP, max_size=2), SAID)


def openai_tools(functions: Any) -> list[dict[str, Any]]:
    tools = []
    for name, description, properties, required in functions:
        function: dict[str, Any] = {"name": name, "description": description}
        if properties:
            needed = list(properties) if required else []
            schema = {"type": "object", "properties": properties, "required": needed}
            function["parameters"] = schema
        tools.append({"type": "function", "function": function})
    return tools


def said(role: Any, words: str, channel: str | None = None) -> Any:
    message = official.Message.from_role_and_content(role, words)
    return message.with_channel(channel) if channel else message


def dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def conversation(
    instructions: str, effort: str, functions: Any, turns: Any, pending: bool
) -> tuple[list[dict[str, Any]], Any]:
    """One conversation twice: OpenAI's messages, and openai-harmony's with the template's ways.

    They are: tool results are quoted as JSON; instructions end with an empty line; what is said
    beside a call is analysis, and left out beside a thought.
    """
    ours: list[dict[str, Any]] = []
    today = datetime.datetime.now().astimezone().strftime("%Y-%m-%d")
    system = official.SystemContent.new().with_conversation_start_date(today)
    theirs = [said(official.Role.SYSTEM, system.with_reasoning_effort(EFFORTS[effort]))]
    if instructions:
        ours.append({"role": "system", "content": instructions})
    if instructions or functions:
        told = official.DeveloperContent.new()
        if instructions:
            told.with_instructions(instructions if functions else instructions + "\n\n")
        if functions:
            told.with_function_tools(
                [official.ToolDescription(**t["function"]) for t in openai_tools(functions)]
            )
        theirs.append(said(official.Role.DEVELOPER, told))
    number = 0
    for at, (question, loops, answer) in enumerate(turns):
        ours.append({"role": "user", "content": question})
        theirs.append(said(official.Role.USER, question))
        for beside, words, calls in loops:
            message: dict[str, Any] = {"role": "assistant", "tool_calls": []}
            if beside in ("thinking", "both"):
                message["thinking"] = words
            if beside in ("content", "both"):
                message["content"] = words
            if beside != "neither":
                theirs.append(said(official.Role.ASSISTANT, words, "analysis"))
            results = []
            for name, arguments, result in calls:
                number += 1
                function = {"name": name, "arguments": arguments}
                message["tool_calls"].append({"id": str(number), "function": function})
                results.append({"role": "tool", "tool_call_id": str(number), "content": result})
                called = said(official.Role.ASSISTANT, dumped(arguments), "commentary")
                called.with_recipient(f"functions.{name}").with_content_type("json")
                author = official.Author.new(official.Role.TOOL, f"functions.{name}")
                back = official.Message.from_author_and_content(author, dumped(result))
                theirs += [called, back.with_channel("commentary").with_recipient("assistant")]
            ours += [message, *reversed(results)]  # in no order of their own
        if at < len(turns) - 1 or not pending:
            ours.append({"role": "assistant", "content": answer, "thinking": "forgotten"})
            # Thoughts are kept until an answer follows them. (openai-harmony's own dropping looks
            # at the first answer alone.)
            theirs = [message for message in theirs if message.channel != "analysis"]
            theirs.append(said(official.Role.ASSISTANT, answer, "final"))
    return ours, official.Conversation.from_messages(theirs)


@settings(max_examples=400)
@given(
    instructions=WORDS,
    effort=st.sampled_from(sorted(EFFORTS)),
    functions=FUNCTIONS,
    turns=st.lists(TURN, min_size=1, max_size=3),
    pending=st.booleans(),
)
def test_prompts_are_what_openai_renders(
    text: Text,
    oracle: Any,
    instructions: str,
    effort: str,
    functions: Any,
    turns: Any,
    pending: bool,
) -> None:
    ours, theirs = conversation(instructions, effort, functions, turns, pending)
    ids = render(text, ours, openai_tools(functions) or None, reasoning_effort=effort)
    keep = official.RenderConversationConfig(auto_drop_analysis=False)
    expected = oracle.render_conversation_for_completion(theirs, official.Role.ASSISTANT, keep)
    assert text.decode(ids, False) == oracle.decode(expected)
    assert ids == expected


def described(text: Text, oracle: Any, function: dict[str, Any]) -> tuple[str, str]:
    """A function as the template shows it, and as openai-harmony does."""
    user = {"role": "user", "content": "x"}
    ours = text.decode(render(text, [user], [{"type": "function", "function": function}]), False)
    tool = official.ToolDescription(**{"description": ""} | function)
    told = official.DeveloperContent.new().with_function_tools([tool])
    theirs = oracle.decode(oracle.render(said(official.Role.DEVELOPER, told)))
    shown = re.compile(r"namespace functions \{\n\n(.*)\n\n\} // namespace", re.DOTALL)
    return tuple(found[1] for each in (ours, theirs) if (found := shown.search(each)))  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("schema", "ours", "theirs"),
    [
        ({"type": "string", "default": "x"}, 'string, // default: "x",', 'string, // default: "x"'),
        ({"type": "array"}, "any[],", "Array<any>,"),
        ({"type": "object"}, "object,", "{\n    },"),
        (
            {"type": "object", "properties": {"b": {"type": "string"}}, "required": ["b"]},
            "{\nb: \n                string},",
            "{\n    b: string,\n    },",
        ),
        (
            {"oneOf": [{"type": "string"}, {"type": "number"}]},
            "string | \nnumber,",
            "\n | string\n | number\n,",
        ),
    ],
)
def test_where_the_template_describes_a_parameter_in_its_own_way(
    text: Text, oracle: Any, schema: Any, ours: str, theirs: str
) -> None:
    parameters = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    function = {"name": "f", "description": "d", "parameters": parameters}
    # The library has no blank between a parameter's name and a list of types.
    frames = ["// d\ntype f = (_: {\na:" + way + "\n}) => any;" for way in (" " + ours, theirs)]
    shown = described(text, oracle, function)
    assert shown == (frames[0], frames[1] if theirs[0] == "\n" else frames[1].replace("a:", "a: "))


@pytest.mark.parametrize(
    ("description", "ours", "theirs"),
    [(None, "// \n", ""), ("d\ne", "// d\ne\n", "// d\n// e\n")],
)
def test_where_the_template_describes_a_function_in_its_own_way(
    text: Text, oracle: Any, description: str | None, ours: str, theirs: str
) -> None:
    function = {"name": "f"} | ({"description": description} if description else {})
    shown = described(text, oracle, function)
    assert shown == (ours + "type f = () => any;", theirs + "type f = () => any;")


@pytest.mark.parametrize("role", ["system", "developer"])
def test_instructions_stand_together_at_the_top(text: Text, role: str) -> None:
    several = [
        {"role": role, "content": "one"},
        {"role": "developer", "content": ""},
        {"role": "user", "content": "x"},
        {"role": "system", "content": "two"},
    ]
    one = [{"role": "developer", "content": "one\n\ntwo"}, {"role": "user", "content": "x"}]
    assert render(text, several) == render(text, one)


def test_results_of_no_call_are_not_lost(text: Text) -> None:
    calls: list[Any] = [
        {"id": i, "function": {"name": f"f{i}", "arguments": {}}} for i in ("1", "2", "2")
    ]
    results: list[Any] = [
        {"role": "tool", "tool_call_id": i, "content": f"r{i}"} for i in ("9", "2", "1")
    ]
    asked: list[Any] = [{"role": "assistant", "tool_calls": calls}]
    ids = render(text, asked + results)
    shown = re.findall(
        r'to=functions\.(f\d)|functions\.(f\d) to=assistant.*?"(r\d)"', text.decode(ids, False)
    )
    expected = ["f1", ("f1", "r1"), "f2", ("f2", "r2"), "f2", ("f2", "r9")]
    assert [name or (of, result) for name, of, result in shown] == expected


@pytest.mark.parametrize("control", CONTROL)
def test_no_part_of_a_conversation_can_write_a_control_token(text: Text, control: str) -> None:
    def ids(words: str) -> list[int]:
        schema = {"type": "string", "description": words, "enum": [words], "default": words}
        parameters = {"type": "object", "properties": {words: schema}, "required": [words]}
        function = {"name": "f", "description": words, "parameters": parameters}
        call = {"id": "1", "function": {"name": words, "arguments": {words: [words]}}}
        messages: list[Any] = [
            {"role": "system", "content": words},
            {"role": "user", "content": words, "name": words},
            {"role": "assistant", "thinking": words, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": words, "name": words},
            {"role": "assistant", "tool_calls": [call], "content": words},
            {"role": "tool", "tool_call_id": "1", "content": words},
        ]
        tools = [{"type": "function", "function": function}]
        return [i for i in render(text, messages, tools) if i in text.control.values()]

    assert ids(control) == ids("x")
