"""Chooses the next token of every sampling row.

A row's token depends on its logits, its sampling parameters, and on (seed, choice, position): not
on the batch, the step, the process, or on what was computed before. Penalties depend on the tokens
seen so far, which are counted on the device; a sequence that comes back brings them along.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.dispatch import Ops
from kernels.reference import NOISY, PROMPT, Draws
from workers.grammar import Grammars, Walk
from workers.wire import Join, Logprobs

Ints = npt.NDArray[np.int64]

COLDEST = 1e-5  # below it a temperature is greedy: logits over it would overflow
TEMPERATURE, TOP_P, MIN_P, REPETITION, FREQUENCY, PRESENCE = range(6)  # rows of Sampler._floats


class Sampler:
    """Sampling parameters by slot, and the choice itself. ``send`` takes a host tensor to where the
    logits are; nothing waits for the device. ``grammars`` has only who samples."""

    def __init__(
        self,
        max_num_seqs: int,
        eos_token_ids: tuple[int, ...],
        ops: Ops,
        send: Callable[[Tensor], Tensor] = lambda tensor: tensor,
        grammars: Grammars | None = None,
    ) -> None:
        self._eos, self._ops, self._send = eos_token_ids, ops, send
        self._floats = np.zeros((6, max_num_seqs), np.float32)
        self._top_k = np.zeros(max_num_seqs, np.int32)
        self._key = np.zeros(max_num_seqs, np.uint64)  # of (seed, choice)
        self._first_stop = np.zeros(max_num_seqs, np.int64)  # stop ids are banned below it
        self._stops: list[list[int]] = [[] for _ in range(max_num_seqs)]
        self._filtered = np.zeros(max_num_seqs, bool)
        self._penalised = np.zeros(max_num_seqs, bool)
        self._logprobs = np.full(max_num_seqs, -1)  # how many likeliest tokens; -1: no logprobs
        self._bias: dict[int, dict[int, float]] = {}
        self._known: dict[int, tuple[int, list[int]]] = {}  # to be counted: prompt tokens, all
        self._grammars = grammars
        self._walks: dict[int, Walk] = {}
        self._counts: Tensor | None = None  # see kernels.reference.penalise; once it is needed

    def join(self, join: Join) -> None:
        """A sequence enters a slot."""
        slot, sampling = join.slot, join.sampling
        self._floats[:, slot] = (
            sampling.temperature if sampling.temperature >= COLDEST else 0.0,
            sampling.top_p,
            sampling.min_p,
            sampling.repetition_penalty,
            sampling.frequency_penalty,
            sampling.presence_penalty,
        )
        self._top_k[slot] = min(sampling.top_k, np.iinfo(np.int32).max)
        self._key[slot] = noise_key(sampling.seed, join.choice)
        self._first_stop[slot] = join.prompt_tokens + sampling.min_tokens
        eos = () if sampling.ignore_eos else self._eos
        self._stops[slot] = sorted({*eos, *sampling.stop_token_ids})
        self._filtered[slot] = bool(sampling.top_k or sampling.min_p) or sampling.top_p < 1
        self._penalised[slot] = sampling.penalised
        self._logprobs[slot] = -1 if sampling.logprobs is None else sampling.logprobs
        self._bias.pop(slot, None)
        self._known.pop(slot, None)
        self._walks.pop(slot, None)
        if sampling.logit_bias:
            self._bias[slot] = sampling.logit_bias
        if sampling.penalised:
            self._known[slot] = (join.prompt_tokens, join.tokens)
        if join.grammar and self._grammars is not None:
            generated = join.tokens[join.prompt_tokens :]
            self._walks[slot] = self._grammars.enter(join.grammar, generated)

    def walks(self, slots: Ints) -> list[tuple[int, Walk]]:
        """The rows of a step that follow a grammar: they must hear which tokens were chosen."""
        if not self._walks:
            return []
        held = enumerate(slots.tolist())
        return [(row, self._walks[slot]) for row, slot in held if slot in self._walks]

    def __call__(self, logits: Tensor, slots: Ints, positions: Ints) -> Tensor:
        """Token ids int64 [R] for logits [R, V].

        ``positions`` are those of the tokens being chosen, counted from the prompt's first token.
        """
        floats = self._floats[:, slots]
        keys = _mix64(self._key[slots] + positions.astype(np.uint64)).view(np.int32).reshape(-1, 2)
        rows = len(slots)
        columns = np.zeros((9, -(-rows // 4) * 4), np.int32)  # aligned alike for any number of rows
        columns[:6, :rows] = floats.view(np.int32)
        columns[6, :rows], columns[7:, :rows] = self._top_k[slots], keys.T
        on_device = self._send(torch.from_numpy(columns))[:, :rows]
        values = on_device[:6].view(torch.float32)
        logits = self._adjusted(logits, slots, positions)
        penalised = np.flatnonzero(self._penalised[slots])
        lines = None
        if len(penalised):
            counts = self._count_known(logits)
            lines = self._send(torch.from_numpy(slots))
            logits = self._ops.penalise(logits, counts, lines, *values[REPETITION:])
        drawn = floats[TEMPERATURE] > 0
        tokens = self._ops.sample(
            logits,
            Draws(
                temperature=values[TEMPERATURE],
                top_k=on_device[6],
                top_p=values[TOP_P],
                min_p=values[MIN_P],
                keys=on_device[7:].T.contiguous(),
                allowed=self._allowed(slots, positions),
                drawn=bool(drawn.any()),
                filtered=bool((drawn & self._filtered[slots]).any()),
            ),
        )
        if lines is not None and self._counts is not None:
            # Lines of slots without penalties count for nothing.
            at = lines * self._counts.shape[1] + tokens
            self._counts.view(-1).index_add_(0, at, torch.ones_like(at, dtype=torch.int32))
        return tokens

    def logprobs(
        self, logits: Tensor, slots: Ints, tokens: Tensor
    ) -> tuple[Ints, Ints, Tensor] | None:
        """Log probabilities of the ``tokens`` [R] that logits [R, V] gave, for rows that ask for
        them: these rows, how many likeliest tokens each wants, and ``log_softmax``'s table."""
        wanted = self._logprobs[slots]
        rows = np.flatnonzero(wanted >= 0)
        if not len(rows):
            return None
        most = min(int(wanted.max()), logits.shape[1])
        return (
            rows,
            wanted[rows],
            log_softmax(logits, self._send(torch.from_numpy(rows)), tokens, most),
        )

    def _adjusted(self, logits: Tensor, slots: Ints, positions: Ints) -> Tensor:
        """Logits with the requests' biases, and without what may not end an answer yet."""
        vocabulary = logits.shape[1]
        at: list[int] = []
        by: list[float] = []
        for row in np.flatnonzero([slot in self._bias for slot in slots.tolist()]).tolist():
            for token, bias in self._bias[slots[row]].items():
                if 0 <= token < vocabulary:  # others are nobody's
                    at.append(row * vocabulary + token)
                    by.append(bias)
        for row in np.flatnonzero(positions < self._first_stop[slots]).tolist():
            if slots[row] in self._walks:
                continue  # see _allowed
            banned = [i for i in self._stops[slots[row]] if i < vocabulary]
            at += [row * vocabulary + token for token in banned]
            by += [-np.inf] * len(banned)
        if not at:
            return logits
        adjusted = logits.float().contiguous() if logits.dtype != torch.float32 else logits.clone()
        index = self._send(torch.tensor(at))
        adjusted.view(-1).index_add_(0, index, self._send(torch.tensor(by, dtype=torch.float32)))
        return adjusted

    def _allowed(self, slots: Ints, positions: Ints) -> Tensor | None:
        """Bits of the tokens that each row's grammar allows, see ``Draws``; one copy to the device.

        What may not end an answer yet is taken out, unless nothing else is left. A row where
        nothing is left at all is an error of its walk, and gets any token.
        """
        walks = self.walks(slots)
        if not walks or self._grammars is None:
            return None
        bits = self._grammars.masks([walk for _, walk in walks])
        for line, (row, walk) in zip(bits, walks, strict=True):
            if positions[row] < self._first_stop[slots[row]]:
                kept = line.copy()
                for token in self._stops[slots[row]]:
                    if token < 32 * len(kept):
                        kept.view(np.uint8)[token // 8] &= ~(1 << token % 8) & 255
                if kept.any():
                    line[:] = kept
            if not walk.error and not line.any():
                walk.error = "no token of this model goes on where the grammar stands"
            if walk.error:
                line[:] = -1
        rows = np.array([[row] for row, _ in walks], np.int32)
        held = self._send(torch.from_numpy(np.hstack([rows, bits])))
        allowed = torch.full((len(slots), bits.shape[1]), -1, dtype=torch.int32, device=held.device)
        return allowed.index_copy_(0, held[:, 0].long(), held[:, 1:])

    def _count_known(self, logits: Tensor) -> Tensor:
        """Counts of all slots, with the tokens that sequences brought along."""
        vocabulary = logits.shape[1]
        if self._counts is None:
            shape = (len(self._top_k), vocabulary)
            self._counts = torch.zeros(shape, dtype=torch.int32, device=logits.device)
        for slot, (prompt, tokens) in self._known.items():
            counts = np.bincount(tokens[prompt:], minlength=vocabulary)
            counts[tokens[:prompt]] += PROMPT
            self._counts[slot] = self._send(torch.from_numpy(counts.astype(np.int32)))
        self._known.clear()
        return self._counts


def log_softmax(logits: Tensor, rows: Tensor, tokens: Tensor, most: int) -> Tensor:
    """int32 [rows, 1 + 2 most]: the log probability of a row's token and those of its likeliest
    ones, fp32 bit for bit, then their ids. logits [R, V], tokens int64 [R], rows int64 [rows]."""
    parts = []
    for part in rows.split(max(1, NOISY // logits.shape[1])):
        scores = logits.index_select(0, part).log_softmax(-1, dtype=torch.float32)
        chosen = scores.gather(1, tokens.index_select(0, part)[:, None])
        best = scores.topk(most)
        values = torch.cat((chosen, best.values), 1)
        parts.append(torch.cat((values.view(torch.int32), best.indices.int()), 1))
    return torch.cat(parts)


def read_logprobs(rows: Ints, wanted: Ints, table: Tensor) -> dict[int, Logprobs]:
    """By row, what ``Sampler.logprobs`` has found, once its table is on the host."""
    most = (table.shape[1] - 1) // 2
    values = table[:, : 1 + most].contiguous().view(torch.float32).tolist()
    ids = table[:, 1 + most :].tolist()
    return {
        row: Logprobs(chosen, best[:n], likeliest[:n])
        for row, n, (chosen, *likeliest), best in zip(
            rows.tolist(), wanted.tolist(), values, ids, strict=True
        )
    }


def noise_key(seed: int, choice: int) -> np.uint64:
    """What (seed, choice) contribute to the noise; the position is added to it."""
    words = np.array([seed & (2**64 - 1)], np.uint64)
    key: np.uint64 = _mix64(_mix64(words) + np.uint64(choice))[0]
    return key


def _mix64(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The output function of SplitMix64 (Steele, Lea, Flood 2014): a bijection of 64 bits."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
