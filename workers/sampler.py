"""Chooses the next token of every sampling row.

Sampling is an argmax over logits / temperature + Gumbel noise (the Gumbel-max trick), and the noise
of a token is a pure function of (seed, choice, position, token id). So a row's token depends on
nothing else: not on the batch, the step, the process, or on what was computed before.

Order of the filters, as elsewhere: temperature, top-k, then top-p of what is left, renormalised.
Tokens equal to the last one kept are kept, too, so that ties need no order.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from workers.wire import Join

_NUCLEUS = 1024  # top-p looks at so many tokens first, and sorts the vocabulary where they are few
_CHUNK = 1 << 22  # logits that get noise at a time


class Sampler:
    """Sampling parameters by slot, and the choice itself."""

    def __init__(self, max_num_seqs: int, eos_token_ids: tuple[int, ...]) -> None:
        self._eos = eos_token_ids
        self._temperature = np.zeros(max_num_seqs, np.float32)
        self._top_k = np.zeros(max_num_seqs, np.int64)
        self._top_p = np.ones(max_num_seqs, np.float32)
        self._key = np.zeros(max_num_seqs, np.uint64)  # of (seed, choice)
        self._first_stop = np.zeros(max_num_seqs, np.int64)  # stop ids are banned below it
        self._stops: list[list[int]] = [[] for _ in range(max_num_seqs)]

    def join(self, join: Join) -> None:
        """A sequence enters a slot."""
        slot, sampling = join.slot, join.sampling
        self._temperature[slot] = sampling.temperature
        self._top_k[slot] = sampling.top_k
        self._top_p[slot] = sampling.top_p
        self._key[slot] = noise_key(sampling.seed, join.choice)
        self._first_stop[slot] = join.prompt_tokens + sampling.min_tokens
        eos = () if sampling.ignore_eos else self._eos
        self._stops[slot] = sorted({*eos, *sampling.stop_token_ids})

    def __call__(
        self, logits: Tensor, slots: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]
    ) -> Tensor:
        """Token ids int64 [R] for logits [R, V] (may be written to).

        ``positions`` are those of the tokens being chosen, counted from the prompt's first token.
        """
        for row in np.flatnonzero(positions < self._first_stop[slots]).tolist():
            banned = [i for i in self._stops[slots[row]] if i < logits.shape[1]]
            logits[row, banned] = -torch.inf
        tokens = logits.argmax(-1)
        drawn = np.flatnonzero(self._temperature[slots] > 0)
        per_chunk = max(1, _CHUNK // logits.shape[1])
        for at in range(0, len(drawn), per_chunk):
            rows = drawn[at : at + per_chunk]
            index = torch.from_numpy(rows).to(logits.device)
            tokens[index] = self._draw(logits[index].float(), slots[rows], positions[rows])
        return tokens

    def _draw(
        self, logits: Tensor, slots: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]
    ) -> Tensor:
        temperature = torch.from_numpy(self._temperature[slots]).to(logits.device)
        scores = logits / temperature[:, None]
        for row, (k, p) in enumerate(zip(self._top_k[slots], self._top_p[slots], strict=True)):
            if 0 < k < scores.shape[1]:
                keep_top_k(scores[row], int(k))
            if p < 1:
                keep_top_p(scores[row], float(p))
        keys = _mix64(self._key[slots] + positions.astype(np.uint64))
        return (scores + gumbel(keys, scores.shape[1], scores.device)).argmax(-1)


def keep_top_k(scores: Tensor, k: int) -> None:
    """Drop (to -inf, in place) all of scores [V] below the k-th largest."""
    scores.masked_fill_(scores < scores.topk(k).values[-1], -torch.inf)


def keep_top_p(scores: Tensor, p: float) -> None:
    """Drop all below the last of the fewest, most probable tokens that together reach ``p``."""
    probabilities = scores.softmax(-1)
    ordered = probabilities.topk(min(_NUCLEUS, len(probabilities))).values
    if ordered.cumsum(0)[-1] < p:
        ordered = probabilities.sort(descending=True).values
    enough = int((ordered.cumsum(0) < p).sum())
    last = ordered[min(enough, len(ordered) - 1)]
    scores.masked_fill_(probabilities < last, -torch.inf)


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


def gumbel(keys: npt.NDArray[np.uint64], vocab: int, device: torch.device) -> Tensor:
    """Gumbel noise fp32 [R, V]: row r, token v depend on (keys[r], v) only.

    Token ids are scrambled by MurmurHash3's 32-bit finaliser, once with each half of the key. 31
    bits give a uniform number whose small values, the ones that let an improbable token win, keep
    full fp32 resolution.
    """
    halves = torch.from_numpy(keys.view(np.int32).reshape(-1, 2)).to(device)
    ids = torch.arange(vocab, dtype=torch.int32, device=device) * _signed(0x9E3779B1)
    bits = _scramble(_scramble(ids ^ halves[:, :1]) ^ halves[:, 1:])
    uniform = ((bits & 0x7FFFFFFF).float() + 0.5) * 2.0**-31
    return uniform.clamp_(max=1 - 2.0**-24).neg_().log1p_().neg_().log_().neg_()


def _scramble(h: Tensor) -> Tensor:
    """int32 arithmetic wraps; a logical shift is an arithmetic one with the sign bits cut off."""
    h = (h ^ (h >> 16 & 0xFFFF)) * _signed(0x85EBCA6B)
    h = (h ^ (h >> 13 & 0x7FFFF)) * _signed(0xC2B2AE35)
    return h ^ (h >> 16 & 0xFFFF)


def _signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word
