"""What gpt-oss's harmony format asks of prompts, and splitting a model's answer into what is said,
what is thought and what is called.

gpt-oss writes harmony: messages of ``<|start|>HEADER<|message|>TEXT`` closed by ``<|end|>``,
``<|return|>`` or ``<|call|>``, where the header names a role, a channel and perhaps a recipient
(https://cookbook.openai.com/articles/openai-harmony). The splitter here is total: any token
sequence whatever gives deltas, no control token reaches them, and what makes no sense becomes
content. Its result does not depend on how the sequence is cut.
"""

from __future__ import annotations

import itertools
import re
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, Literal, Protocol

import msgspec

from cluster.template import ChatTemplateError
from cluster.text import Text
from workers.wire import Logprobs

Kind = Literal["content", "reasoning", "call"]

# Longer than any header: a role, a channel and a 64-character function name, a byte per token.
HEADER_TOKENS = 256
_RECIPIENT = re.compile(r"(?:^|\s)to=(\S+)")
# Recipients that are no function: who takes part in the conversation.
_PEOPLE = frozenset({"", "all", "assistant", "developer", "system", "tool", "user"})


class Token(msgspec.Struct, frozen=True):
    """A token of the content; ``offset`` counts the characters of content before its text."""

    id: int
    offset: int
    logprobs: Logprobs


class Delta(msgspec.Struct, frozen=True):
    """More text of one kind. ``call`` counts the tool calls of an answer from 0; the first delta of
    a call has its function's ``name`` and no text."""

    kind: Kind
    text: str
    call: int = -1
    name: str = ""
    tokens: Sequence[Token] = ()  # whose text it completes, where log probabilities were asked for


class Splitter(Protocol):
    thoughts: int  # tokens of reasoning so far

    @property
    def kind(self) -> Kind | None:
        """What the next token's text will be; None where that is not known yet."""

    def feed(self, tokens: Sequence[int]) -> list[Delta]: ...

    def finish(self) -> list[Delta]:
        """What is still held back; the splitter is not used again."""
        ...


class Plain:
    """For models without channels: everything is content."""

    thoughts = 0
    kind: Kind = "content"

    def __init__(self, text: Text, skip_control: bool = True) -> None:
        self._detokenizer = text.detokenizer(skip_control)

    def feed(self, tokens: Sequence[int]) -> list[Delta]:
        return _content(self._detokenizer.feed(tokens))

    def finish(self) -> list[Delta]:
        return _content(self._detokenizer.flush())


class Harmony:
    """An automaton with two states, in a header and in a message's text."""

    def __init__(self, text: Text, prompt: Sequence[int]) -> None:
        """``prompt`` ends where the answer starts, usually inside a header, after
        ``<|start|>assistant``."""
        self._text = text
        self._roles = {text.control[name]: name for name in CONTROL if name in text.control}
        self._control = frozenset(text.control.values())
        self._detokenizer = text.detokenizer()
        self._kind: Kind | None = None  # None: in a header
        self._started = False  # the header began with <|start|>
        self._header: list[list[int]] = [[]]  # its text, cut at control tokens
        self._channel = 0  # which part names the channel; 0: none so far
        self._count = 0  # tokens in the header
        self.thoughts = self._calls = 0
        self._deltas: list[Delta] = []
        self._said: set[Kind] = set()  # kinds that have text
        self._break: set[Kind] = set()  # kinds whose next text is another message's
        self._given = 0  # tokens of the header that the prompt holds
        self._carry: list[Delta] = []
        start = text.control["<|start|>"]
        if start in prompt:
            last = len(prompt) - 1 - list(reversed(prompt)).index(start)
            self.feed(prompt[last:])
            # The prompt's own text is no part of the answer; a call that it opens is.
            self._carry = [delta for delta in self._deltas if delta.name]
            self._given = self._count
            self._said.clear()
            self.thoughts = 0

    @property
    def kind(self) -> Kind | None:
        return self._kind

    def feed(self, tokens: Sequence[int]) -> list[Delta]:
        self._deltas, self._carry = self._carry, []
        if self._kind is not None and self._control.isdisjoint(tokens):
            self.thoughts += len(tokens) if self._kind == "reasoning" else 0
            self._say(self._detokenizer.feed(tokens))
            return _merge(self._deltas)
        for token in tokens:
            if token in self._control:
                self._turn(self._roles.get(token, ""))
            elif self._kind is not None:
                self.thoughts += self._kind == "reasoning"
                self._say(self._detokenizer.feed((token,)))
            else:
                self._header[-1].append(token)
                self._count += 1
                # Where the prompt has named the role, what cannot be a header is known at once.
                if self._count > HEADER_TOKENS or (self._given and not self._partial()):
                    self._give_up()
        return _merge(self._deltas)

    def finish(self) -> list[Delta]:
        self._deltas, self._carry = self._carry, []
        if self._kind is not None:
            self._say(self._detokenizer.flush())
        elif not self._partial():
            self._give_up()
            self._say(self._detokenizer.flush())
        return _merge(self._deltas)

    def _turn(self, control: str) -> None:
        """A control token: leave a message's text, or move on in its header."""
        if control == "<|message|>" and self._kind is None:
            self._open()
        elif control in ("<|end|>", "<|return|>", "<|call|>", "<|start|>", "<|channel|>"):
            if self._kind is not None:
                self._say(self._detokenizer.flush())
            elif control != "<|channel|>" and not self._partial():
                # Text between messages, or a header that never came to its message.
                self._give_up()
                self._say(self._detokenizer.flush())
            if self._kind is not None or control != "<|channel|>":
                self._header, self._channel, self._count, self._given = [[]], 0, 0, 0
                self._kind, self._started = None, control == "<|start|>"
            if control == "<|channel|>":
                self._header.append([])
                self._channel = self._channel or len(self._header) - 1
        elif control == "<|constrain|>" and self._kind is None:
            self._header.append([])
        # Any other control token says nothing and is not shown.

    def _open(self) -> None:
        """``<|message|>``: the header is complete and says what the text is."""
        parts = [self._text.decode(part) for part in self._header]
        channel = (parts[self._channel].split() or [""])[0] if self._channel else ""
        found = _RECIPIENT.search(" ".join(parts))
        recipient = found[1] if found else ""
        called = recipient.removeprefix("functions.")
        self._detokenizer = self._text.detokenizer()
        if (called and recipient != called) or (channel == "commentary" and called not in _PEOPLE):
            self._kind = "call"
            self._deltas.append(Delta("call", "", self._calls, called))
            self._calls += 1
            return
        self._kind = "reasoning" if channel == "analysis" else "content"
        if self._kind in self._said:
            self._break.add(self._kind)

    def _partial(self) -> bool:
        """Whether the header is one that broke off, as opposed to text where no header belongs."""
        if self._channel:
            return True
        tokens = [token for part in self._header for token in part]
        given = self._text.decode(tokens[: self._given])
        if " to=" in given:
            return True
        text = self._text.decode(tokens[self._given :])
        if self._started and not given:
            _, space, rest = text.strip().partition(" ")  # a role comes first
            text = space + rest
        elif given.startswith(text):
            return True  # the role is being said again
        text = text.removeprefix(given)
        return not text.strip() or text.startswith(" to=") or " to=".startswith(text)

    def _give_up(self) -> None:
        """No header after all: what was taken for one is content."""
        self._kind = "content"
        self._detokenizer = self._text.detokenizer()
        if "content" in self._said:
            self._break.add("content")
        tokens = [token for part in self._header for token in part]
        self._say(self._detokenizer.feed(tokens[self._given :]))

    def _say(self, text: str) -> None:
        if not text or self._kind is None:
            return
        if self._kind == "call":
            self._deltas.append(Delta("call", text, self._calls - 1))
            return
        if self._kind in self._break:
            self._break.discard(self._kind)
            text = "\n" + text
        self._said.add(self._kind)
        self._deltas.append(Delta(self._kind, text))


CONTROL = (
    *("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"),
    *("<|end|>", "<|return|>", "<|call|>"),
)


def spoken(text: Text) -> bool:
    """Whether the model speaks harmony: its tokenizer has the control tokens."""
    return text.control.keys() >= {"<|start|>", "<|channel|>", "<|message|>", "<|end|>"}


def splitter(text: Text, prompt: Sequence[int]) -> Splitter:
    """The splitter for a chat answer."""
    return Harmony(text, prompt) if spoken(text) else Plain(text)


Json = dict[str, Any]


def render(
    text: Text, messages: Sequence[Json], tools: Sequence[Json] | None = None, **options: Any
) -> list[int]:
    """As ``Text.render``, for OpenAI's messages and tools, of which gpt-oss's chat template leaves
    out what it does not expect. Raises as that."""
    if not spoken(text):
        return text.render(messages, tools, **options)
    # It writes every tool's description.
    tools = tools and [
        tool | {"function": {"description": ""} | tool["function"]} for tool in tools
    ]
    messages = _one_call_each(_instructions_first(messages))
    try:
        return text.render(messages, tools, **options)
    except ChatTemplateError:
        # It takes reasoning or content beside a call, not both. The model needs its reasoning to
        # go on from a tool's result.
        both = {"tool_calls", "thinking", "content"}
        fewer = [
            {name: value for name, value in message.items() if name != "content"}
            if both <= message.keys()
            else message
            for message in messages
        ]
        if fewer == messages:
            raise
        return text.render(fewer, tools, **options)


def _instructions_first(messages: Sequence[Json]) -> list[Json]:
    """All instructions as the first message: the only place where they are looked for."""
    told = [message for message in messages if message["role"] in ("system", "developer")]
    rest = [message for message in messages if message["role"] not in ("system", "developer")]
    if not told:
        return rest
    return [told[0] | {"content": "\n\n".join(m["content"] for m in told if m["content"])}, *rest]


def _one_call_each(messages: Sequence[Json]) -> list[Json]:
    """Calls that were made at once as one after the other, each with its results behind it: a
    message has one call, and a result is taken for that of the call before it."""
    out: list[Json] = []
    todo = deque(messages)
    while todo:
        message = todo.popleft()
        calls = message.get("tool_calls") or []
        if len(calls) < 2:
            out.append(message)
            continue
        results: dict[str, list[Json]] = {}
        while todo and todo[0]["role"] == "tool":
            result = todo.popleft()
            results.setdefault(result["tool_call_id"], []).append(result)
        for at, call in enumerate(calls):
            # What was thought and said before them belongs to the first.
            out.append((message if at == 0 else {"role": "assistant"}) | {"tool_calls": [call]})
            out += results.pop(call["id"], [])
        out += itertools.chain.from_iterable(results.values())
    return out


def _content(text: str) -> list[Delta]:
    return [Delta("content", text)] if text else []


def _merge(deltas: Iterable[Delta]) -> list[Delta]:
    """Neighbours of one kind as one delta."""
    merged: list[Delta] = []
    for delta in deltas:
        last = merged[-1] if merged else None
        if last and last.kind == delta.kind and last.call == delta.call and not delta.name:
            merged[-1] = Delta(last.kind, last.text + delta.text, last.call, last.name)
        else:
            merged.append(delta)
    return merged
