"""Values that cross a process boundary: requests, step plans, outputs, load.

Everything here is a plain msgspec value, so any of it can be recorded, replayed or sent to another
process. This module imports nothing of moeray. Times are durations in milliseconds: clocks differ
between hosts, so no absolute time is ever sent.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import msgspec
import numpy as np

FinishReason = Literal["stop", "length", "abort", "error", "refused", "timeout"]
Wait = Literal["grammar", "image", "remote_kv"]


class Sampling(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the next token is chosen. Every value is concrete: the ingress resolves defaults."""

    max_tokens: int
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 keeps the whole vocabulary
    top_p: float = 1.0
    seed: int = 0  # the noise of a token is a function of (seed, choice, position)
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    min_p: float = 0.0  # least share of the best token's probability
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}  # added to the logits of these tokens
    logprobs: int | None = None  # how many of the likeliest come with every token; None: nothing

    @property
    def penalised(self) -> bool:
        """Whether the next token depends on how often others came before."""
        neutral = (0.0, 0.0, 1.0)
        return neutral != (self.presence_penalty, self.frequency_penalty, self.repetition_penalty)


class Request(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One sequence to generate: a replayable value.

    ``prompt``, ``sampling``, ``choice`` and ``emitted`` determine every later token, so the same
    value can be recomputed anywhere: after preemption, on another engine, after a restart.
    """

    id: str  # unique among live sequences; choice 2 of request "r" is another id
    model: str
    prompt: list[int]
    sampling: Sampling
    choice: int = 0
    emitted: list[int] = []  # tokens already sent to the client: resume after them
    epoch: int = 0  # which attempt at this request; outputs carry it back
    priority: int = 0  # lower runs first
    hashes: list[bytes] = []  # prefix hashes of the prompt's full blocks; empty: engine computes
    salt: str = ""  # isolates the prefix cache between tenants
    deadline_ms: int | None = None  # time left to finish, when sent
    waits: tuple[Wait, ...] = ()  # what must be resolved before the first step
    grammar: str = ""  # what the answer must follow, see workers.grammar; empty: anything goes


class Abort(msgspec.Struct, frozen=True):
    """Stop a request and free what it holds; answered by an Output with reason ``abort``."""

    id: str


class Logprobs(msgspec.Struct, array_like=True, gc=False):
    """Of one sampled token: log softmax of the model's own logits, in fp32, before temperature,
    penalties, biases and masks."""

    chosen: float
    tokens: list[int]  # the likeliest ones, best first
    values: list[float]  # theirs


class Output(msgspec.Struct, array_like=True, gc=False):
    """New tokens of one request, or the reason it ended (then it is the last one).

    ``offset`` counts generated tokens (``emitted`` included), so gaps and repeats can be seen.
    """

    id: str
    epoch: int
    offset: int
    tokens: list[int]
    reason: FinishReason | None = None
    detail: str | None = None  # for all but "stop" and "length": a sentence for the user
    cached: int = 0  # prompt tokens taken from the prefix cache; on the first Output
    stop: int | None = None  # the stop token that ended it, when one did
    logprobs: list[Logprobs] | None = None  # one for each of ``tokens``, where they were asked for


class GroupLoad(msgspec.Struct, array_like=True, gc=False):
    """KV blocks of one attention group."""

    name: str  # "full", "window:128", "chunk:8192"
    used: int  # blocks held by live requests


class Load(msgspec.Struct, gc=False, kw_only=True):
    """What one engine is doing; counters are totals since its start."""

    running: int = 0
    waiting: int = 0
    queued_tokens: int = 0  # prompt tokens not computed yet
    blocks: int = 0  # KV blocks in the pool
    free: int = 0  # free or evictable blocks
    groups: list[GroupLoad] = []
    steps: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefix_queries: int = 0  # prompt tokens looked up in the prefix cache
    prefix_hits: int = 0  # prompt tokens found there
    finished: dict[str, int] = {}  # by reason
    expert_calls: list[int] = []  # (token, expert) pairs computed, by rank
    expert_imbalance: float = 1.0  # of these, see parallelism.placement; 1: evenly spread
    batch_tokens: int = 0  # tokens in the last step
    progress_ms: int = 0  # since a step ended, or since the engine became idle


class Engine(msgspec.Struct, frozen=True, array_like=True):
    """Identity of one engine: what routing, load, epochs and the side channel address."""

    service: str
    model: str
    replica: str
    dp_rank: int = 0


class Outputs(msgspec.Struct, array_like=True, gc=False):
    """All outputs of one step for one ingress."""

    engine: Engine
    epoch: int  # of the engine: a restarted engine has a higher one
    outputs: list[Output]
    load: Load | None = None


class Join(msgspec.Struct, array_like=True, gc=False):
    """A sequence enters a slot, for the first time or again after preemption."""

    slot: int
    sampling: Sampling
    choice: int
    prompt_tokens: int  # positions below this are the prompt
    tokens: list[int] = []  # all that are known, where penalties or a grammar ask for them
    grammar: str = ""


class Table(msgspec.Struct, array_like=True, gc=False):
    """Block ids appended to one slot's table of one KV group, starting at block ``first``."""

    slot: int
    group: int
    first: int
    blocks: list[int]


class Row(msgspec.Struct, frozen=True):
    """One sequence's share of a step, as :meth:`Batch.rows` shows it."""

    slot: int
    start: int  # position of its first token
    count: int  # tokens computed for it in this step
    sample: bool  # whether its last token yields a new one
    tokens: list[int] | None  # None: the token last sampled in this slot


class Round(msgspec.Struct, frozen=True, array_like=True):
    """A step of several engines together: number ``number`` of those that use their experts."""

    number: int
    tokens: tuple[int, ...]  # of every engine; one without any takes part all the same


class Batch(msgspec.Struct, array_like=True, gc=False):
    """One step, as a value: which tokens of which slots are computed, and where KV goes.

    Columns are little-endian bytes, one entry per row, so that encoding costs the same for 10 and
    2,000 rows. A batch without rows is legal: a rank with nothing to do still takes part.
    Step 0 is none of the scheduler's: the engine takes part in a round of others.
    A row whose ``given`` flag is 0 has count 1 and continues from the slot's last sampled token,
    whose value the batch never names; so a step can be planned before the previous one is known.
    """

    step: int
    slots: bytes = b""  # int32[R]
    starts: bytes = b""  # int32[R]
    counts: bytes = b""  # int32[R]
    given: bytes = b""  # uint8[R]
    samples: bytes = b""  # uint8[R]
    tokens: bytes = b""  # int32[sum of counts of given rows]
    joins: list[Join] = []
    tables: list[Table] = []
    round: Round | None = None  # None: no other engine is needed

    def __len__(self) -> int:
        return len(self.given)

    @property
    def num_tokens(self) -> int:
        return int(np.frombuffer(self.counts, np.int32).sum())

    def rows(self) -> Iterator[Row]:
        """The same step row by row; for tests, simulators and readers, not for the hot path."""
        tokens = np.frombuffer(self.tokens, np.int32)
        at = 0
        for slot, start, count, given, sample in zip(
            np.frombuffer(self.slots, np.int32).tolist(),
            np.frombuffer(self.starts, np.int32).tolist(),
            np.frombuffer(self.counts, np.int32).tolist(),
            self.given,
            self.samples,
            strict=True,
        ):
            ids = tokens[at : at + count].tolist() if given else None
            at += count if given else 0
            yield Row(slot, start, count, bool(sample), ids)


class StepResult(msgspec.Struct, array_like=True, gc=False):
    """What a step produced: 0..k tokens for every sampling row, in row order."""

    step: int
    tokens: list[int]
    counts: list[int] | None = None  # per sampling row; None: one each
    transfers: list[str] = []  # ids of requests whose KV transfer has finished
    logprobs: dict[int, Logprobs] = {}  # by sampling row, of those that asked
    errors: dict[int, str] = {}  # sampling rows that got no token, and why: these requests end
