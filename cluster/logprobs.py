"""Log probabilities of an answer's content: which tokens they belong to, and OpenAI's two shapes.

Content is made of tokens that a client may not see as such: half characters, headers that turn out
to be text, tails held back for a stop string. A token is shown with the text that it completes;
control tokens, headers, reasoning and calls are not content. Of a text that a stop string has cut
only tokens are shown that lie before the cut as a whole.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import msgspec

from cluster.harmony import Delta, Splitter, Token
from cluster.text import Text
from workers.wire import Logprobs


class Attribution:
    """Follows a splitter token by token."""

    def __init__(self, text: Text, splitter: Splitter, skip_control: bool) -> None:
        names = text.control if skip_control else {}
        self._splitter = splitter
        self._control = frozenset(names.values())
        self._resets = frozenset(id for name, id in names.items() if name in RESETS)
        self._pending: list[tuple[int, Logprobs | None]] = []  # tokens whose text is to come
        self._placed: deque[tuple[int, Token]] = deque()  # and where their text ends
        self._said = self._shown = 0  # characters of content, before stop strings and after

    def feed(self, token: int, logprobs: Logprobs | None) -> list[Delta]:
        """What the splitter gives for the next token."""
        before = self._splitter.kind
        deltas = self._splitter.feed((token,))
        after = self._splitter.kind
        if token not in self._control:
            self._pending.append((token, logprobs))
        placed = self._place(deltas)
        moved = token in self._control and before != after
        if not placed and (deltas or moved or (after is None and token in self._resets)):
            self._pending.clear()
        return deltas

    def finish(self) -> list[Delta]:
        deltas = self._splitter.finish()
        self._place(deltas)
        return deltas

    def show(self, deltas: list[Delta]) -> None:
        """``deltas`` are shown: their last content gets the tokens whose text is all out."""
        content = [at for at, delta in enumerate(deltas) if delta.kind == "content"]
        self._shown += sum(len(deltas[at].text) for at in content)
        shown = []
        while self._placed and self._placed[0][0] <= self._shown:
            shown.append(self._placed.popleft()[1])
        if shown:
            deltas[content[-1]] = msgspec.structs.replace(deltas[content[-1]], tokens=shown)

    def _place(self, deltas: Sequence[Delta]) -> bool:
        """Whether they have content; what was pending is then part of it."""
        length = sum(len(delta.text) for delta in deltas if delta.kind == "content")
        if not length:
            return False
        start, self._said = self._said, self._said + length
        for token, logprobs in self._pending:
            if logprobs is not None:  # else it was sent before this answer went on
                self._placed.append((self._said, Token(token, start, logprobs)))
        self._pending.clear()
        return True


# Control tokens that leave a message or a header behind.
RESETS = ("<|start|>", "<|end|>", "<|return|>", "<|call|>")


class LikelyToken(msgspec.Struct, gc=False):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprobs(LikelyToken, gc=False):
    top_logprobs: list[LikelyToken]


class ChatLogprobs(msgspec.Struct, gc=False):
    content: list[TokenLogprobs]
    refusal: None = None


class TextLogprobs(msgspec.Struct, gc=False):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


def chat_logprobs(text: Text, tokens: Sequence[Token]) -> ChatLogprobs:
    """As ``/v1/chat/completions`` sends them."""

    content = []
    for token in tokens:
        top = []
        for id, value in zip(token.logprobs.tokens, token.logprobs.values, strict=True):
            piece = text.piece(id)
            top.append(LikelyToken(_name(piece, ""), value, [*piece]))
        piece = text.piece(token.id)
        content.append(TokenLogprobs(_name(piece, ""), token.logprobs.chosen, [*piece], top))
    return ChatLogprobs(content)


def text_logprobs(text: Text, tokens: Sequence[Token]) -> TextLogprobs:
    """As ``/v1/completions`` sends them: the sampled token is always among the top ones."""
    out = TextLogprobs([], [], [], [])
    for token in tokens:
        ids, values = token.logprobs.tokens, token.logprobs.values
        top: dict[str, float] = {}
        for id, value in zip([*ids, token.id], [*values, token.logprobs.chosen], strict=True):
            top.setdefault(_name(text.piece(id), "bytes:"), value)
        out.tokens.append(_name(text.piece(token.id), "bytes:"))
        out.token_logprobs.append(token.logprobs.chosen)
        out.top_logprobs.append(top)
        out.text_offset.append(token.offset)
    return out


def _name(piece: bytes, prefix: str) -> str:
    """A token as text; one that is no whole characters as its bytes in hexadecimal."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return prefix + "".join(f"\\x{byte:02x}" for byte in piece)
