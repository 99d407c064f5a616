"""Grammars that hold an answer to a form: compiled once, walked token by token.

A grammar is a text in llguidance's dialect of Lark, with control tokens as ids (``<[7]>``). Where
a sequence is in its grammar depends on the tokens it has generated and on nothing else, so a
sequence that was preempted or resumed walks there again.
"""

from __future__ import annotations

import atexit
import functools
import json
import logging
import math
import os
import re
import resource
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask_par

ANYTHING = r"start: /(.|\n)*/"
KEPT = 16  # compiled grammars, each with the lexer states of its walks: at most 1.1 GiB of them
STACK = 128 << 20  # bytes; compiling recurses through a schema's references, 8 KiB a level
# A state takes 0.7 KiB, and a string of bounded length seven for each character. Errors do not show
# the grammar and what was generated.
LIMITS = LLParserLimits(max_lexer_states=100_000, verbose_errors=False)
TRIAL_SECONDS = 2  # of CPU, for all grammars of a request; most take a few milliseconds
TRIAL_BYTES = 4 << 30  # of address space, where a process has half a GiB before its first grammar
_STACK_SIZE = threading.Lock()  # of new threads, a setting of the whole process

log = logging.getLogger(__name__)


def trouble(grammars: Sequence[str]) -> tuple[int, str] | None:
    """The first of ``grammars``, without control tokens, that leads nowhere, and why.

    Tried in a process of its own, as the library's limits do not bound all that a schema can ask
    for: a hundred ``patternProperties`` take a second, a thousand would take minutes. Not for an
    event loop.
    """
    return _trial().run(grammars)


@functools.cache
def _trial() -> _Trial:
    trial = _Trial()
    atexit.register(trial.end)
    return trial


class _Trial:
    """A process that compiles grammars until one takes too much; the next one gets a new process.

    It ends when its input does, and so with whoever started it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[str] | None = None

    def run(self, grammars: Sequence[str]) -> tuple[int, str] | None:
        with self._lock:
            if self._child is not None and self._child.poll() is not None:
                self.end()
            if (child := self._child) is None:
                child = self._child = subprocess.Popen(
                    [sys.executable, "-P", __file__],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
                    text=True,
                    start_new_session=True,
                )
            assert child.stdin is not None
            assert child.stdout is not None
            giving_up = threading.Timer(30.0 + TRIAL_SECONDS, child.kill)
            giving_up.start()
            try:
                with suppress(BrokenPipeError):
                    child.stdin.write(json.dumps(grammars) + "\n")  # Ray's ``print`` adds to it
                    child.stdin.flush()
                for at in range(len(grammars)):
                    if not (line := child.stdout.readline()):
                        self.end()
                        if child.returncode >= 0:  # else a signal: out of time or of memory
                            raise RuntimeError("the process that tries JSON schemas failed")
                        return (
                            at,
                            f"it takes over {TRIAL_SECONDS} s, or too much memory, to compile",
                        )
                    if why := json.loads(line):
                        return at, why
            finally:
                giving_up.cancel()
            return None

    def end(self) -> None:
        """The process, if there is one, with its input."""
        if self._child is not None:
            try:
                self._child.communicate(timeout=TRIAL_SECONDS)
            except subprocess.TimeoutExpired:
                self._child.kill()
                self._child.communicate()
            self._child = None


def _try_grammars() -> None:
    """What the process of a trial does: lists of grammars in, a line for each one tried out."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (TRIAL_BYTES, TRIAL_BYTES))
    for line in sys.stdin:
        used = resource.getrusage(resource.RUSAGE_SELF)
        seconds = math.ceil(used.ru_utime + used.ru_stime) + TRIAL_SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.RLIM_INFINITY))
        for grammar in json.loads(line):
            why = _try(grammar)
            print(json.dumps(why), flush=True)
            if why:
                break


def _try(grammar: str) -> str:
    """Why a grammar leads nowhere; empty if it can begin."""
    found: list[str] = []

    def check() -> None:
        matcher = LLMatcher(_bytes(), grammar, log_level=0, limits=LIMITS)
        if not matcher.is_error():  # up to where there is a choice
            matcher.consume_tokens(matcher.compute_ff_tokens())
            matcher.compute_bitmask()
        found.append(_brief(matcher.get_error()))

    _deep(check)
    return found[0] if found else "it cannot be compiled"


@functools.cache
def _bytes() -> LLTokenizer:
    """A vocabulary of single bytes, for who has no model at hand."""
    return LLTokenizer(TokenizerWrapper(_Bytes()))


class _Bytes:
    eos_token_id = 256
    bos_token_id = None
    tokens = (*(bytes([byte]) for byte in range(256)), b"<end>")
    special_token_ids = (256,)

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


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
            self.error = f"the grammar cannot go on: {_brief(self.matcher.get_error())}"


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
            log.warning("no grammars for this model: %s", _brief(str(error)))

    def compile(self, grammar: str) -> LLMatcher | None:
        """At its start, and not to be moved; None where there is none."""
        if self._tokenizer is None:
            return None
        with self._lock:
            if found := self._compiled.get(grammar):
                self._compiled.move_to_end(grammar)
                return found
        made: list[LLMatcher] = []
        tokenizer = self._tokenizer
        _deep(lambda: made.append(LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS)))
        if not made:
            return None  # the library failed, and has said so in the log
        with self._lock:
            self._compiled[grammar] = made[0]
            if len(self._compiled) > KEPT:
                self._compiled.popitem(last=False)
        return made[0]

    def enter(self, grammar: str, tokens: Sequence[int]) -> Walk:
        """A walk to where ``tokens`` lead. Compiles only what is no longer kept."""
        start = self.compile(grammar)
        if start is None:
            return Walk(None, "this model cannot be held to this grammar")
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
    thread = threading.Thread(target=work)
    with _STACK_SIZE:
        before = threading.stack_size(STACK)
        try:
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


def _brief(text: str) -> str:
    """llguidance's message in a line, without the place in the grammar."""
    if not text:
        return ""
    first, *rest = text.strip().splitlines()
    if first.startswith("NoExtension"):
        return "nothing is allowed where it stands"
    first += "".join(f" {line}" for line in rest if line.startswith("error: "))
    return re.sub(r"^at \d+\(\d+\): (failed to compile JSON schema: )?", "", first)[:300]


if __name__ == "__main__":
    _try_grammars()
