"""The next token in Triton: penalties, filters, noise and argmax, without asking the host.

A row's filters come down to one threshold: the largest score t such that what scores at least t is
enough, be it k tokens or a share p of the probability. It is found digit by digit: scores become
integers of the same order, and each pass over the row tries all 16 values of the next four bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import launch
from kernels.reference import PROMPT, Draws

COLUMNS = 1024  # of a row at a time
PARTS = 32  # programs that share a row when it is drawn


@triton.jit
def _ordered(scores):  # type: ignore[no-untyped-def]
    """fp32 -> uint32 of the same order."""
    bits = scores.to(tl.uint32, bitcast=True)
    return tl.where(bits >> 31 != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def _value(ordered):  # type: ignore[no-untyped-def]
    bits = tl.where(ordered >> 31 != 0, ordered & 0x7FFFFFFF, ordered ^ 0xFFFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _scores(  # type: ignore[no-untyped-def]
    logits_ptr, allowed_ptr, allowed_stride, row, stride, v, vocab, temperature
):
    """Scores of tokens v, fp32; -inf outside of the vocabulary and for what is not allowed."""
    inside = v < vocab
    scores = tl.load(logits_ptr + row * stride + v, mask=inside, other=float("-inf"))
    scores = scores.to(tl.float32)
    # A model that is broken must not take the engine with it: NaN is never the best.
    scores = tl.where(scores == scores, scores, float("-inf"))
    if allowed_ptr is not None:
        words = tl.load(allowed_ptr + row * allowed_stride + v // 32, mask=inside, other=0)
        scores = tl.where((words >> (v % 32)) & 1 != 0, scores, float("-inf"))
    # A greedy row is not divided: 0 is its temperature. No score is so large that the difference
    # of two is no number.
    scores = scores / tl.where(temperature > 0, temperature, 1.0)
    return tl.minimum(scores, 3.0e38)


@triton.jit
def _thresholds(  # type: ignore[no-untyped-def]
    logits_ptr,
    allowed_ptr,
    temperatures_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    thresholds_ptr,
    vocab,
    stride,
    allowed_stride,
    COLUMNS: tl.constexpr,
):
    """Grid (R): the least score that a row's filters keep."""
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperatures_ptr + row)
    k, p, least = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), tl.load(min_p_ptr + row)
    columns = tl.arange(0, COLUMNS)
    digits = tl.arange(0, 16).to(tl.uint32)
    tops = tl.full([COLUMNS], float("-inf"), tl.float32)
    for at in range(0, vocab, COLUMNS):
        scores = _scores(
            logits_ptr, allowed_ptr, allowed_stride, row, stride, at + columns, vocab, temperature
        )
        tops = tl.maximum(tops, scores)
    top = tl.max(tops, 0)
    low = _ordered(tl.full([], float("-inf"), tl.float32))
    if (temperature > 0) & (k > 0) & (k < vocab):
        found = low * 0
        for step in range(8):
            shift = low * 0 + (28 - 4 * step)
            tries = found + (digits << shift)
            counts = tl.zeros([16], tl.int32)
            for at in range(0, vocab, COLUMNS):
                v = at + columns
                scores = _scores(
                    logits_ptr, allowed_ptr, allowed_stride, row, stride, v, vocab, temperature
                )
                enough = _ordered(scores)[:, None] >= tries[None, :]
                counts += tl.sum((enough & (v < vocab)[:, None]).to(tl.int32), 0)
            digit = tl.sum((counts >= k).to(tl.int32), 0) - 1
            found += digit.to(tl.uint32) << shift
        low = found
    if (temperature > 0) & (p < 1):
        mass = tl.zeros([COLUMNS], tl.float32)
        for at in range(0, vocab, COLUMNS):
            scores = _scores(
                logits_ptr, allowed_ptr, allowed_stride, row, stride, at + columns, vocab,
                temperature,
            )  # fmt: skip
            mass += tl.where(_ordered(scores) >= low, tl.exp(scores - top), 0.0)
        wanted = p * tl.sum(mass, 0)
        found = low * 0
        for step in range(8):
            shift = low * 0 + (28 - 4 * step)
            tries = tl.maximum(found + (digits << shift), low)
            masses = tl.zeros([16], tl.float32)
            for at in range(0, vocab, COLUMNS):
                scores = _scores(
                    logits_ptr, allowed_ptr, allowed_stride, row, stride, at + columns, vocab,
                    temperature,
                )  # fmt: skip
                enough = _ordered(scores)[:, None] >= tries[None, :]
                masses += tl.sum(tl.where(enough, tl.exp(scores - top)[:, None], 0.0), 0)
            # Rounding may leave even the first sum short of what is wanted.
            digit = tl.maximum(tl.sum((masses >= wanted).to(tl.int32), 0) - 1, 0)
            found += digit.to(tl.uint32) << shift
        low = tl.maximum(found, low)
    threshold = _value(low)
    if (temperature > 0) & (least > 0):
        threshold = tl.maximum(threshold, top + tl.log(least))
    tl.store(thresholds_ptr + row, threshold)


@triton.jit
def _scramble(h):  # type: ignore[no-untyped-def]
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def _bits(low, high, v):  # type: ignore[no-untyped-def]
    """The random integers of tokens v: uint32."""
    return _scramble(_scramble((v.to(tl.uint32) * 0x9E3779B1) ^ low) ^ high)


@triton.jit
def _gumbel(bits):  # type: ignore[no-untyped-def]
    uniform = ((bits & 0x7FFFFFFF).to(tl.int32).to(tl.float32) + 0.5) * 4.656612873077393e-10
    uniform = tl.minimum(uniform, 0.99999994)
    # log1p(-u): what rounding takes from 1 - u, the first term of the series gives back.
    rest = 1.0 - uniform
    log1p = tl.log(rest) + ((1.0 - rest) - uniform) / rest
    return -tl.log(-log1p)


@triton.jit
def _draw(  # type: ignore[no-untyped-def]
    logits_ptr,
    allowed_ptr,
    temperatures_ptr,
    thresholds_ptr,
    keys_ptr,
    best_ptr,
    ids_ptr,
    vocab,
    stride,
    allowed_stride,
    each,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Grid (R, PARTS): the best of ``each`` tokens, and its id."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    temperature = tl.load(temperatures_ptr + row)
    low = tl.load(keys_ptr + 2 * row).to(tl.uint32, bitcast=True)
    high = tl.load(keys_ptr + 2 * row + 1).to(tl.uint32, bitcast=True)
    columns = tl.arange(0, COLUMNS)
    best = tl.full([COLUMNS], float("-inf"), tl.float32)
    ids = tl.full([COLUMNS], 2147483647, tl.int32)
    end = tl.minimum((part + 1) * each, vocab)
    for at in range(part * each, end, COLUMNS):
        v = at + columns
        scores = _scores(logits_ptr, allowed_ptr, allowed_stride, row, stride, v, end, temperature)
        if temperature > 0:
            if thresholds_ptr is not None:
                scores = tl.where(scores >= tl.load(thresholds_ptr + row), scores, float("-inf"))
            scores += _gumbel(_bits(low, high, v))
        # Strictly better only, so that the lowest id among equals stays.
        better = (scores > best) | ((ids == 2147483647) & (v < end))
        best = tl.where(better, scores, best)
        ids = tl.where(better, v, ids)
    top = tl.max(best, 0)
    tl.store(best_ptr + row * PARTS + part, top)
    tl.store(ids_ptr + row * PARTS + part, tl.min(tl.where(best == top, ids, 2147483647), 0))


@triton.jit
def _pick(best_ptr, ids_ptr, tokens_ptr, PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Grid (R): the best of the parts, the lowest id among equals."""
    row = tl.program_id(0).to(tl.int64)
    parts = tl.arange(0, PARTS)
    best = tl.load(best_ptr + row * PARTS + parts)
    ids = tl.load(ids_ptr + row * PARTS + parts)
    # Parts without tokens have none for an id.
    best = tl.where(ids == 2147483647, float("-inf"), best)
    token = tl.min(tl.where(best == tl.max(best, 0), ids, 2147483647), 0)
    tl.store(tokens_ptr + row, token.to(tl.int64))


@triton.jit
def _penalise(  # type: ignore[no-untyped-def]
    logits_ptr,
    counts_ptr,
    lines_ptr,
    repetition_ptr,
    frequency_ptr,
    presence_ptr,
    out_ptr,
    vocab,
    stride,
    PROMPT: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Grid (R, vocabulary / COLUMNS)."""
    row = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = v < vocab
    line = tl.load(lines_ptr + row)
    seen = tl.load(counts_ptr + line * vocab + v, mask=inside, other=0)
    logits = tl.load(logits_ptr + row * stride + v, mask=inside, other=0.0).to(tl.float32)
    generated = seen & (PROMPT - 1)
    factor = tl.where(seen > 0, tl.load(repetition_ptr + row), 1.0)
    logits = tl.where(logits > 0, logits / factor, logits * factor)
    logits -= tl.load(frequency_ptr + row) * generated.to(tl.float32)
    logits -= tl.load(presence_ptr + row) * (generated > 0).to(tl.float32)
    tl.store(out_ptr + row * vocab + v, logits, mask=inside)


def sample(logits: Tensor, draws: Draws) -> Tensor:
    """See ``kernels.reference.sample``. The noise's integers are the same, its floats within 2
    units in the last place; top-p's threshold differs where sums of probabilities round otherwise.
    """
    rows, vocab = logits.shape
    assert logits.stride(1) == 1
    vectors = (draws.temperature, draws.top_k, draws.top_p, draws.min_p, draws.keys)
    assert all(vector.is_contiguous() for vector in vectors)
    allowed, device = draws.allowed, logits.device
    masked = (allowed, 0 if allowed is None else allowed.stride(0))
    thresholds = None
    if draws.drawn and draws.filtered:
        thresholds = torch.empty(rows, dtype=torch.float32, device=device)
        launch(
            _thresholds,
            (rows,),
            logits,
            masked[0],
            draws.temperature,
            draws.top_k,
            draws.top_p,
            draws.min_p,
            thresholds,
            vocab,
            logits.stride(0),
            masked[1],
            COLUMNS=COLUMNS,
            num_warps=8,
        )
    best = torch.empty(rows, PARTS, dtype=torch.float32, device=device)
    ids = torch.empty(rows, PARTS, dtype=torch.int32, device=device)
    tokens = torch.empty(rows, dtype=torch.int64, device=device)
    launch(
        _draw,
        (rows, PARTS),
        logits,
        masked[0],
        draws.temperature,
        thresholds,
        draws.keys,
        best,
        ids,
        vocab,
        logits.stride(0),
        masked[1],
        triton.cdiv(vocab, PARTS),
        PARTS=PARTS,
        COLUMNS=COLUMNS,
        num_warps=4,
    )
    launch(_pick, (rows,), best, ids, tokens, PARTS=PARTS, num_warps=1)
    return tokens


def penalise(
    logits: Tensor,
    counts: Tensor,
    lines: Tensor,
    repetition: Tensor,
    frequency: Tensor,
    presence: Tensor,
) -> Tensor:
    """See ``kernels.reference.penalise``."""
    rows, vocab = logits.shape
    assert all(vector.is_contiguous() for vector in (lines, repetition, frequency, presence))
    assert logits.stride(1) == 1
    assert counts.is_contiguous()
    out = torch.empty(rows, vocab, dtype=torch.float32, device=logits.device)
    launch(
        _penalise,
        (rows, triton.cdiv(vocab, COLUMNS)),
        logits,
        counts,
        lines,
        repetition,
        frequency,
        presence,
        out,
        vocab,
        logits.stride(0),
        PROMPT=PROMPT,
        COLUMNS=COLUMNS,
        num_warps=4,
    )
    return out
