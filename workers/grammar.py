"""Grammars that hold an answer to a form: compiled once, walked token by token.

A grammar is a text in llguidance's dialect of Lark, with control tokens as ids (``<[7]>``). Where
a sequence is in its grammar depends on the tokens it has generated and on nothing else, so a
sequence that was preempted or resumed walks there again.
"""

from __future__ import annotations

import json
import logging
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask_par

ANYTHING = r"start: /(.|\n)*/"
KEPT = 128  # compiled grammars
STACK = 128 << 20  # bytes; compiling recurses through a schema's references, 8 KiB a level
# A lexer state takes 1 to 2 KiB; errors without the grammar and what was generated.
LIMITS = LLParserLimits(max_lexer_states=50_000, verbose_errors=False)

log = logging.getLogger(__name__)


def trouble(grammar: str) -> str:
    """Why a grammar cannot be compiled; empty if it can. No tokenizer is needed.

    Of bounded cost, but not for an event loop: 0.1 s for the worst of 64 KiB.
    """
    found: list[str] = []

    def check() -> None:
        failed, messages = LLMatcher.validate_grammar_with_warnings(grammar, limits=LIMITS)
        found.append(_first_line(messages[0]) if failed else "")

    _deep(check)
    return found[0]


class Walk:
    """One sequence's way through its grammar. ``error``: why it cannot go on."""

    def __init__(self, matcher: LLMatcher | None, error: str) -> None:
        self.matcher, self.error = matcher, error

    def advance(self, tokens: Sequence[int]) -> None:
        """Past the tokens that came next."""
        if self.matcher is not None and not self.error:
            self.matcher.consume_tokens(list(tokens))
            self.look()

    def look(self) -> None:
        """See whether the matcher has given up: it tells nobody of its own accord."""
        if self.matcher is not None and self.matcher.is_error():
            self.error = f"the grammar cannot go on: {_first_line(self.matcher.get_error())}"


class Grammars:
    """The grammars of one model. Safe in any thread.

    Without a tokenizer that llguidance can read there are none: every walk is an error.
    """

    def __init__(self, directory: Path, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self._vocab_size = vocab_size
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()
        self._executor = LLExecutor()
        self._tokenizer: LLTokenizer | None = None
        try:
            # A second for 200,000 tokens, with the interpreter's lock held: not while serving.
            source = _nameless((directory / "tokenizer.json").read_text(encoding="utf-8"))
            self._tokenizer = LLTokenizer(source, vocab_size, list(eos_token_ids) or None)
        except (OSError, ValueError, LookupError, TypeError) as error:
            log.warning("no grammars for this model: %s", _first_line(str(error)))

    def compile(self, grammar: str) -> LLMatcher | None:
        """At its start, and not to be moved; None without a tokenizer."""
        if self._tokenizer is None:
            return None
        with self._lock:
            if found := self._compiled.get(grammar):
                self._compiled.move_to_end(grammar)
                return found
        made: list[LLMatcher] = []
        tokenizer = self._tokenizer
        _deep(lambda: made.append(LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS)))
        with self._lock:
            self._compiled[grammar] = made[0]
            if len(self._compiled) > KEPT:
                self._compiled.popitem(last=False)
        return made[0]

    def enter(self, grammar: str, tokens: Sequence[int]) -> Walk:
        """A walk to where ``tokens`` lead. Compiles only what is no longer kept."""
        start = self.compile(grammar)
        if start is None:
            return Walk(None, "this model's tokenizer cannot be held to a grammar")
        walk = Walk(start.deep_copy(), "")
        walk.look()
        walk.advance(tokens)
        return walk

    def masks(self, walks: Sequence[Walk]) -> npt.NDArray[np.int32]:
        """What may come next in each: int32 [walks, ceil(V / 32)], a bit for each token."""
        bits = allocate_token_bitmask(len(walks), self._vocab_size)
        going = [
            (walk.matcher, at)
            for at, walk in enumerate(walks)
            if walk.matcher is not None and not walk.error
        ]
        if going:
            fill_next_token_bitmask_par(self._executor, going, bits)
        for walk in walks:
            walk.look()
        return bits


def _deep(work: Callable[[], None]) -> None:
    """Call ``work`` on a stack that no schema exhausts: that would end the process."""
    before = threading.stack_size(STACK)
    try:
        thread = threading.Thread(target=work)
        thread.start()
    finally:
        threading.stack_size(before)
    thread.join()


def _nameless(source: str) -> str:
    """A ``tokenizer.json`` whose control tokens have names that no text holds: else a document that
    must say ``<|end|>`` would be given the control token."""
    tree = json.loads(source)
    private = {t["content"]: f"\U000f0000{t['id']}" for t in tree["added_tokens"] if t["special"]}
    for token in tree["added_tokens"]:
        token["content"] = private.get(token["content"], token["content"])
    vocab = tree["model"]["vocab"]
    if isinstance(vocab, dict):
        tree["model"]["vocab"] = {private.get(name, name): id for name, id in vocab.items()}
    return json.dumps(tree)


def _first_line(text: str) -> str:
    """Of llguidance's messages, without the place in the grammar."""
    line = text.strip().split("\n", 1)[0]
    return re.sub(r"^at \d+\(\d+\): (failed to compile JSON schema: )?", "", line)[:300]
