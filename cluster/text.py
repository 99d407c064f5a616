"""Text and token ids: tokenizer, incremental detokenizer, stop strings.

Control tokens (``<|start|>`` and its kin: added tokens marked special) are a matter of trust. In a
chat only the model's own template may write them. So the template is compiled with every control
token in its literals replaced by an unguessable private name, and what it renders is encoded by a
tokenizer that knows control tokens by those private names alone: whatever a message says, in
whatever pieces and through whatever filters, it stays plain text.
"""

from __future__ import annotations

import codecs
import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import Tokenizer

from cluster.template import ChatTemplate, ChatTemplateError
from workers.hub import read_json


class NoTokenizer(ValueError):
    """The model's directory has no tokenizer: prompts must be token ids."""


class SamplingDefaults(msgspec.Struct, frozen=True):
    """What ``generation_config.json`` says for requests that are silent."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


class Text:
    """What one model's directory says about text: ``tokenizer.json``, ``tokenizer_config.json``,
    ``chat_template.jinja`` and ``generation_config.json``. All methods are safe in any thread.

    Without ``tokenizer.json`` the model serves token ids: encoding raises NoTokenizer, decoding
    yields nothing. Without a chat template ``render`` raises ChatTemplateError.
    """

    def __init__(self, directory: str | Path) -> None:
        directory = Path(directory)
        self.directory = directory
        generation = _read_json(directory / "generation_config.json")
        self.defaults = SamplingDefaults(
            temperature=0.0
            if generation.get("do_sample") is False
            else float(_first(generation.get("temperature"), 1.0)),
            top_p=float(_first(generation.get("top_p"), 1.0)),
            top_k=max(0, int(_first(generation.get("top_k"), 0))),
            min_p=float(_first(generation.get("min_p"), 0.0)),
            repetition_penalty=float(_first(generation.get("repetition_penalty"), 1.0)),
        )
        self.control: dict[str, int] = {}  # control token -> id
        self.longest = 1  # characters of the longest token
        self._tokenizer: Tokenizer | None = None
        self._templates: dict[str, ChatTemplate] = {}
        self._pieces: dict[int, bytes] = {}
        path = directory / "tokenizer.json"
        if not path.is_file():
            return
        source = path.read_text(encoding="utf-8")
        try:
            self._tokenizer = Tokenizer.from_str(source)
        except Exception as error:  # tokenizers raises nothing narrower
            raise ValueError(f"{path} is not a tokenizer: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        tree = json.loads(source)
        self.control = {t["content"]: t["id"] for t in tree["added_tokens"] if t["special"]}
        private = _private_names(self.control)
        self._private = Tokenizer.from_str(json.dumps(_rename(tree, private)))
        config = _read_json(directory / "tokenizer_config.json")
        named = {
            name: value if isinstance(value, str) else value["content"]
            for name, value in config.items()
            if name.endswith("_token")
            and (isinstance(value, str) or (isinstance(value, dict) and "content" in value))
        }
        for name, template in _template_sources(directory, config).items():
            self._templates[name] = ChatTemplate(template, named, private)
        decoder = tree.get("decoder") or {}
        kinds = [step["type"] for step in decoder.get("decoders", [decoder]) if step]
        self._byte_level = kinds == ["ByteLevel"]
        if "ByteLevel" in kinds and not self._byte_level:
            raise ValueError(f"{path}: the decoder {kinds} is not supported (ByteLevel alone is)")
        self.longest = max((len(t) for t in self._tokenizer.get_vocab()), default=1)

    def encode(self, text: str) -> list[int]:
        """Ids of a raw prompt, as ``/v1/completions`` takes it: control tokens written in it are
        control tokens, and the tokenizer's own prefix (BOS) is added.

        Raises NoTokenizer.
        """
        return list(self._require().encode(text).ids)

    def encode_plain(self, text: str) -> list[int]:
        """Ids of text that cannot contain a control token, whatever it says. Raises NoTokenizer."""
        self._require()
        return list(self._private.encode(text, add_special_tokens=False).ids)

    @property
    def has_tokenizer(self) -> bool:
        return self._tokenizer is not None

    @property
    def has_chat_template(self) -> bool:
        return "default" in self._templates

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> list[int]:
        """Ids of a conversation up to where the assistant's answer starts.

        ``messages`` and ``tools`` are plain JSON values as the chat template expects them;
        ``options`` (``reasoning_effort`` ...) reach it by name. Nothing in them can become a
        control token. Raises NoTokenizer, ChatTemplateError.
        """
        self._require()
        template = self._templates.get("tool_use") if tools else None
        template = template or self._templates.get("default")
        if template is None:
            raise ChatTemplateError(
                f"the model in {self.directory.name!r} has no chat template: use /v1/completions, "
                "or put a chat_template.jinja beside its tokenizer"
            )
        rendered = template.render(
            messages=messages, tools=tools, documents=None, add_generation_prompt=True, **options
        )
        return list(self._private.encode(rendered, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int], skip_control: bool = True) -> str:
        """Text of ``ids``; ids the tokenizer does not know are left out."""
        if self._tokenizer is None:
            return ""
        return str(self._tokenizer.decode(ids, skip_special_tokens=skip_control))

    def detokenizer(self, skip_control: bool = True) -> Detokenizer:
        """A fresh incremental decoder: its deltas add up to ``decode`` of all the ids."""
        return Detokenizer(self, skip_control)

    def _require(self) -> Tokenizer:
        if self._tokenizer is None:
            raise NoTokenizer(
                f"the model in {self.directory.name!r} has no tokenizer.json: send the prompt as "
                "token ids to /v1/completions"
            )
        return self._tokenizer

    def piece(self, token: int) -> bytes:
        """UTF-8 bytes of one token's text on its own; of a control token those of its name."""
        if self._tokenizer is None or self._byte_level:
            return self._piece(token)
        name = self._tokenizer.id_to_token(token) or ""
        if _BYTE_TOKEN.fullmatch(name):
            return bytes([int(name[3:5], 16)])
        return name.replace(SPACE, " ").encode()

    def _piece(self, token: int) -> bytes:
        """UTF-8 bytes of one token of a byte-level vocabulary."""
        piece = self._pieces.get(token)
        if piece is None:
            name = self._tokenizer.id_to_token(token) if self._tokenizer else None
            try:
                piece = bytes(_BYTE_OF[c] for c in name or "")
            except KeyError:  # an added token outside the byte alphabet stands for itself
                piece = (name or "").encode()
            self._pieces[token] = piece
        return piece


class Detokenizer:
    """Turns token ids into text as they come; never emits half a character.

    The deltas of ``feed`` and the last one of ``flush`` add up to ``Text.decode`` of all ids.
    The cost per token does not grow with the text.
    """

    def __init__(self, text: Text, skip_control: bool = True) -> None:
        self._text = text
        self._skip = frozenset(text.control.values()) if skip_control else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        # For decoders whose pieces depend on their neighbours: ids decoded before, the text they
        # make, and ids whose text is not settled yet.
        self._before: list[int] = []
        self._shown = ""
        self._pending: list[int] = []

    def feed(self, ids: Iterable[int]) -> str:
        """Text that ``ids`` settle."""
        tokenizer = self._text._tokenizer
        if tokenizer is None:
            return ""
        if self._skip:
            ids = [i for i in ids if i not in self._skip]
        if self._text._byte_level:
            piece = self._text._piece
            return self._utf8.decode(b"".join([piece(i) for i in ids]))
        text = ""
        for token in ids:
            name = tokenizer.id_to_token(token)
            if name is None:
                continue
            self._pending.append(token)
            # A run of byte tokens is decoded as a whole: one bad byte spoils all of it.
            if not _BYTE_TOKEN.fullmatch(name):
                text += self._settle(tokenizer)
        return text

    def flush(self) -> str:
        """What was held back, with U+FFFD for incomplete characters."""
        tokenizer = self._text._tokenizer
        if tokenizer is None:
            return ""
        if self._text._byte_level:
            return self._utf8.decode(b"", final=True)
        return self._settle(tokenizer) if self._pending else ""

    def _settle(self, tokenizer: Tokenizer) -> str:
        """Decode the pending ids after their neighbour, so that what depends on it comes right."""
        whole = str(tokenizer.decode(self._before + self._pending, skip_special_tokens=False))
        delta = whole[len(self._shown) :]
        if delta:
            alone = str(tokenizer.decode(self._pending, skip_special_tokens=False))
            # Where a token's text vanishes alone (a leading space is stripped) its neighbour stays.
            self._before = self._pending if alone else self._before + self._pending
            self._shown = alone or whole
        else:
            self._before = self._before + self._pending
        self._pending = []
        return delta


class StopStrings:
    """Ends a text at the first moment it contains one of ``stops``.

    Text before the stop string is passed on, except a tail that may still become one; with
    ``include`` the stop string, too. Where several
    stop strings end at the same character the longest counts. The result does not depend on how
    the text is cut into deltas.
    """

    def __init__(self, stops: Sequence[str] = (), include: bool = False) -> None:
        assert all(stops), "an empty stop string would match everywhere"
        self._stops, self._include = tuple(stops), include
        self._held = ""
        self.matched: str | None = None

    def feed(self, text: str) -> str:
        """Text that is safe to show; nothing once ``matched`` is set."""
        if not self._stops:
            return text
        if self.matched is not None:
            return ""
        text = self._held + text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            end, at, self.matched = min(found)
            self._held = ""
            return text[: end if self._include else at]
        held = max(map(self._overlap, self._stops, [text] * len(self._stops)))
        cut = len(text) - held
        self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """The tail that was held back and did not become a stop string."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _overlap(stop: str, text: str) -> int:
        """Length of the longest end of ``text`` that ``stop`` goes on from."""
        at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
        while at >= 0:
            if stop.startswith(text[at:]):
                return len(text) - at
            at = text.find(stop[0], at + 1)
        return 0


def _template_sources(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name; a file beats the tokenizer's configuration."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        return {"default": path.read_text(encoding="utf-8")}
    given = config.get("chat_template")
    if isinstance(given, str):
        return {"default": given}
    return {entry["name"]: entry["template"] for entry in given or ()}


def _private_names(control: Iterable[str]) -> dict[str, str]:
    """An unguessable name for every control token, of characters from the private use areas, which
    no filter trims or changes the case of."""
    nonce = "".join(chr(0xE000 + byte) for byte in secrets.token_bytes(16))
    return {token: nonce + chr(0xF0000 + index) for index, token in enumerate(control)}


def _rename(tree: dict[str, Any], private: Mapping[str, str]) -> dict[str, Any]:
    """A ``tokenizer.json`` in which control tokens are known by their private names only."""
    for token in tree["added_tokens"]:
        if token["special"]:
            token |= {"content": private[token["content"]], "normalized": False}
    model = tree["model"]
    # Most models list control tokens in the vocabulary too, where plain text could reach them. The
    # unknown token is no control token: text reaches it by being unknown.
    unknown = model.get("unk_token")
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {
            name if name == unknown else private.get(name, name): i for name, i in vocab.items()
        }
    else:
        model["vocab"] = [[private.get(name, name), score] for name, score in vocab]
    return tree | {"post_processor": None, "truncation": None, "padding": None}


def _read_json(file: Path) -> Mapping[str, Any]:
    return read_json(file) if file.exists() else {}


def _first(value: Any, default: Any) -> Any:
    return default if value is None else value


def _byte_alphabet() -> dict[str, int]:
    """The 256 characters by which byte-level vocabularies (GPT-2's) write bytes: printable Latin-1
    stands for itself, the others for U+0100 onwards in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(others)}


_BYTE_OF = _byte_alphabet()
_BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")
SPACE = "\u2581"  # how other vocabularies write it
