"""The mathematics of every kernel in plain torch: what the others are measured against.

Shapes: T tokens of a step, D hidden size, N output features, H query heads, KV key heads,
G = H / KV, d head size, E experts on this rank, k experts per token, I intermediate size of this
rank, S slots of the KV cache (block * block_size + offset). Sums, softmax and norms are in fp32.
Source of the model's mathematics: the gpt-oss model card, arXiv:2508.10925.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import int4, mxfp4, nvfp4
from kernels.int4 import Int4
from kernels.mxfp4 import MXFP4
from kernels.nvfp4 import NVFP4


@dataclass(frozen=True, slots=True)
class Rows:
    """One step's rows in one KV group: row r computes positions starts[r] .. + counts[r].

    Tensors of R are int64 on the CPU. Position p of row r is in block
    tables[lines[r]][p // block_size]; entries that the group's window has left, or past the last
    position, are never read. The cache holds ``zero_block`` beyond the pool: all of it is always 0.
    Rows of no tokens at the end are padding, and so are tokens beyond those of the rows.
    """

    starts: Tensor
    counts: Tensor
    lines: Tensor
    tables: Tensor  # int32 [lines, blocks] on the CPU
    resident: Tensor  # the same on the device
    tokens: int  # T
    block_size: int
    zero_block: int
    window: int = 0  # a token sees the last so many, itself included; 0: all
    chunk: int = 0  # a token sees those since the last multiple of it; 0: all

    def slots(self, row: Tensor | int, positions: Tensor) -> Tensor:
        """Slots of a row's positions (or of pairs of row and position)."""
        blocks = self.tables[self.lines[row], positions // self.block_size].long()
        return blocks * self.block_size + positions % self.block_size

    def written(self) -> Tensor:
        """[T] the slot that each new token's key and value go to; -1 for padding."""
        rows = torch.repeat_interleave(self.counts)
        before = self.counts.cumsum(0) - self.counts
        positions = torch.arange(len(rows)) - (before - self.starts)[rows]
        return F.pad(self.slots(rows, positions), (0, self.tokens - len(rows)), value=-1)

    def first_key(self, position: Tensor) -> Tensor:
        """The first position that a query at ``position`` sees; the last is its own."""
        if self.chunk:
            return position - position % self.chunk
        return (position - self.window + 1).clamp(min=0) if self.window else position * 0


@dataclass(frozen=True, slots=True)
class Span:
    """The queries of one row and the keys they see."""

    first: int  # index of its first token in the step
    count: int
    keys: Tensor  # int64 [L] slots
    visible: Tensor  # bool [count, L]


@dataclass(frozen=True, slots=True)
class Plan:
    """What attention needs to know of a step: computed once, used by all layers of a group."""

    slots: Tensor  # int64 [T]: where new keys and values go
    spans: Sequence[Span]


Put = Callable[[Tensor], Tensor]  # a tensor on the CPU, where the kernels run


def plan(rows: Rows, put: Put) -> Plan:
    spans = []
    at = 0
    for row, (start, count) in enumerate(
        zip(rows.starts.tolist(), rows.counts.tolist(), strict=True)
    ):
        query = torch.arange(start, start + count)[:, None]
        key = torch.arange(int(rows.first_key(query[0])), start + count)
        visible = (key <= query) & (key >= rows.first_key(query))
        spans.append(Span(at, count, put(rows.slots(row, key)), put(visible)))
        at += count
    return Plan(put(rows.written()), spans)


def rms_norm(x: Tensor, weight: Tensor, eps: float, round_first: bool = False) -> Tensor:
    """[T, D] -> [T, D] (arXiv:1910.07467), computed in fp32.

    gpt-oss multiplies by the weight while still fp32, Llama rounds to x's dtype first.
    """
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    return (y.to(x.dtype) * weight if round_first else y * weight).to(x.dtype)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, round_first: bool = False
) -> tuple[Tensor, Tensor]:
    """(norm of the sum, the sum), both [T, D]."""
    total = residual + x
    return rms_norm(total, weight, eps, round_first), total


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [T, K], weight [N, K], bias [N] -> [T, N]."""
    return F.linear(x, weight, bias)


def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate x [T, H, d] (arXiv:2104.09864): elements i and i + d/2, or 2 i and 2 i + 1.

    cos and sin are [T, 1, d] in x's dtype, for both elements of a pair: sin is negated for the
    first, so that a rotation is x * cos + (x with every pair swapped) * sin.
    """
    swapped = (
        x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        if interleaved
        else x.roll(x.shape[-1] // 2, -1)
    )
    return x * cos + swapped * sin


def rope_kv_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    interleaved: bool = False,
) -> Tensor:
    """Rotate q [T, H, d] and k [T, KV, d]; store k and v in the caches [S, KV, d] at ``slots``
    int64 [T]; return q. Caches may be fp8 (e4m3): what it cannot hold becomes its largest value.

    Padding has negative slots and is not stored, on devices that pad."""
    k = rope(k, cos, sin, interleaved)
    if k_cache.dtype == torch.float8_e4m3fn:
        k, v = (t.clamp(-448, 448).to(k_cache.dtype).view(torch.uint8) for t in (k, v))
        k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    k_cache.index_copy_(0, slots, k)
    v_cache.index_copy_(0, slots, v)
    return rope(q, cos, sin, interleaved)


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, plan: Plan, sinks: Tensor, scale: float
) -> Tensor:
    """Attention with a sink per head: q [T, H, d], caches [S, KV, d], sinks [H] -> [T, H * d].

    Caches are in q's dtype or fp8 (e4m3, scale 1).

    The sink takes part in the softmax with its own logit and no value, so weights sum to less
    than 1 (arXiv:2309.17453 motivates it; a learned logit per head is gpt-oss's form).
    """
    group = q.shape[1] // k_cache.shape[1]
    out = torch.empty_like(q)
    for span in plan.spans:
        rows = slice(span.first, span.first + span.count)
        k = k_cache[span.keys].float().repeat_interleave(group, dim=1)
        v = v_cache[span.keys].float().repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q[rows].float(), k) * scale
        scores = scores.masked_fill(~span.visible, -torch.inf)
        sink = sinks.float()[:, None, None].expand(-1, span.count, 1)
        p = torch.cat((scores, sink), dim=-1).softmax(dim=-1)[..., :-1]
        out[rows] = torch.einsum("hqk,khd->qhd", p, v).to(q.dtype)
    return out.flatten(1)


def route(logits: Tensor, k: int, slots: Tensor) -> tuple[Tensor, Tensor]:
    """[T, experts] -> ids int64 [T, k] and weights fp32 [T, k]: softmax over the top k only.

    A token whose KV slot (int64 [T]) is negative is padding and goes to no expert: its ids are -1.
    """
    top, ids = logits.topk(k, dim=-1)
    ids = ids.masked_fill_(slots[:, None] < 0, -1)
    return ids, top.softmax(dim=-1, dtype=torch.float32)


def swiglu(x: Tensor, limit: float, alpha: float, plain: bool = False) -> Tensor:
    """[..., 2 I] with gate and up interleaved -> [..., I]: gate * sigmoid(alpha gate) * (up + 1).

    The gate is clamped from above only. ``plain``: gate * sigmoid(gate) * up (arXiv:2002.05202).
    """
    gate, up = x[..., 0::2].float(), x[..., 1::2].float()
    if plain:
        return (F.silu(gate) * up).to(x.dtype)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (gate * torch.sigmoid(alpha * gate) * (up + 1)).to(x.dtype)


Weights = Tensor | MXFP4 | NVFP4 | Int4


def pack(w: Weights) -> Weights:
    """The experts' matrices as ``experts`` wants them: here as they are."""
    return w


def experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    w13: Weights,
    b13: Tensor,
    w2: Weights,
    b2: Tensor | None,
    first: int,
    limit: float,
    alpha: float,
    plain: bool = False,
    activations: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:
    """The weighted sum over those of each token's experts that live on this rank: [T, D].

    x [T, D], ids and weights [T, k] (global expert ids), w13 [E, 2 I, D], b13 [E, 2 I],
    w2 [E, D, I], b2 [E, D], for experts first .. first + E - 1. ``b2`` is None on the ranks that
    must not add it again when I is sharded. The weight multiplies the biased output.
    ``activations`` is done to what enters a product: ``as_mxfp8`` or ``as_nvfp4`` where tensor
    cores take that.
    """
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for e in range(len(b13)):
        mine = torch.where(ids == first + e, weights, 0).sum(-1, keepdim=True)
        h = F.linear(activations(x), expert(w13, e, x.dtype), b13[e])
        h = swiglu(h, limit, alpha, plain)
        y = F.linear(activations(h), expert(w2, e, x.dtype), None if b2 is None else b2[e])
        total += torch.where(mine > 0, mine * y.float(), 0)
    return total.to(x.dtype)


@dataclass(frozen=True, slots=True)
class Draws:
    """How R rows choose their tokens; on the device but for the last two.

    Order of the filters, as elsewhere: temperature, top-k, then top-p of what is left,
    renormalised, then min-p. Tokens equal to the last one kept are kept, too, so that ties need no
    order.
    """

    temperature: Tensor  # fp32 [R]; 0 is greedy: no filter, no noise
    top_k: Tensor  # int32 [R]; 0 keeps all
    top_p: Tensor  # fp32 [R]; 1 keeps all
    min_p: Tensor  # fp32 [R]: least share of the best token's probability; 0 keeps all
    keys: Tensor  # int32 [R, 2]: all that the noise depends on besides the token
    allowed: Tensor | None  # int32 [R, ceil(V / 32)], a bit for each token; None: all
    drawn: bool  # whether any row is not greedy
    filtered: bool  # whether any row has a filter


def sample(logits: Tensor, draws: Draws) -> Tensor:
    """logits [R, V] -> token ids int64 [R], the lowest one among equals.

    An argmax over logits / temperature + Gumbel noise (the Gumbel-max trick), whose noise is a pure
    function of a row's keys and the token: a row's token depends on nothing but the row.
    """
    if draws.allowed is not None:
        bit = torch.arange(logits.shape[1], device=logits.device)
        held = draws.allowed[:, bit // 32] >> (bit % 32) & 1
        logits = logits.masked_fill(held == 0, -torch.inf)
    tokens = logits.argmax(-1)
    if not draws.drawn:
        return tokens
    rows = torch.nonzero(draws.temperature > 0)[:, 0]
    for part in rows.split(max(1, NOISY // logits.shape[1])):
        scores = logits[part].float() / draws.temperature[part, None]
        if draws.filtered:
            filters = (draws.top_k, draws.top_p, draws.min_p)
            for row, k, p, least in zip(scores, *(f[part].tolist() for f in filters), strict=True):
                keep(row, k, p, least)
        tokens[part] = (scores + gumbel(draws.keys[part], scores.shape[1])).argmax(-1)
    return tokens


NOISY = 1 << 22  # logits that get noise at a time
NUCLEUS = 1024  # top-p looks at so many tokens first, and sorts the vocabulary where they are few


def keep(scores: Tensor, k: int, p: float, least: float) -> None:
    """Drop (to -inf, in place) of scores [V] what top-k, top-p and min-p do not keep."""
    if 0 < k < len(scores):
        scores.masked_fill_(scores < scores.topk(k).values[-1], -torch.inf)
    if p < 1:
        probabilities = scores.softmax(-1)
        ordered = probabilities.topk(min(NUCLEUS, len(probabilities))).values
        if ordered.cumsum(0)[-1] < p:
            ordered = probabilities.sort(descending=True).values
        enough = int((ordered.cumsum(0) < p).sum())
        last = ordered[min(enough, len(ordered) - 1)]
        scores.masked_fill_(probabilities < last, -torch.inf)
    if least > 0:
        scores.masked_fill_(scores < scores.max() + math.log(least), -torch.inf)


def gumbel(keys: Tensor, vocab: int) -> Tensor:
    """Gumbel noise fp32 [R, V]: row r, token v depend on (keys[r], v) only.

    Token ids are scrambled by MurmurHash3's 32-bit finaliser, once with each half of the key. 31
    bits give a uniform number whose small values, the ones that let an improbable token win, keep
    full fp32 resolution.
    """
    ids = torch.arange(vocab, dtype=torch.int32, device=keys.device) * _signed(0x9E3779B1)
    bits = _scramble(_scramble(ids ^ keys[:, :1]) ^ keys[:, 1:])
    uniform = ((bits & 0x7FFFFFFF).float() + 0.5) * 2.0**-31
    return uniform.clamp_(max=1 - 2.0**-24).neg_().log1p_().neg_().log_().neg_()


def _scramble(h: Tensor) -> Tensor:
    """int32 arithmetic wraps; a logical shift is an arithmetic one with the sign bits cut off."""
    h = (h ^ (h >> 16 & 0xFFFF)) * _signed(0x85EBCA6B)
    h = (h ^ (h >> 13 & 0x7FFFF)) * _signed(0xC2B2AE35)
    return h ^ (h >> 16 & 0xFFFF)


def _signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word


def penalise(
    logits: Tensor,
    counts: Tensor,
    lines: Tensor,
    repetition: Tensor,
    frequency: Tensor,
    presence: Tensor,
) -> Tensor:
    """logits [R, V] -> fp32 [R, V]; row r's tokens are counted in counts[lines[r]].

    ``counts`` int32 [lines, V]: how often a token was generated, plus PROMPT if it is in the
    prompt. Repetition (arXiv:1909.05858) divides a positive logit of a token seen anywhere, and
    multiplies a negative one; frequency is taken off for every time that a token was generated,
    presence once. Penalties are fp32 [R].
    """
    seen = counts[lines]
    generated = seen & (PROMPT - 1)
    logits = logits.float()
    factor = torch.where(seen > 0, repetition[:, None], 1.0)
    logits = torch.where(logits > 0, logits / factor, logits * factor)
    return logits - frequency[:, None] * generated - presence[:, None] * (generated > 0)


PROMPT = 1 << 24  # in a count: the prompt has the token


def quantize_mxfp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [T, K] -> e4m3 [T, K] and scales u8 [T, K / 32], K a multiple of 32; s means 2^(s - 127).

    A block's scale is the largest power of two in it over 2^8, the largest in e4m3; what then is
    above 448 becomes 448 (OCP Microscaling specification 1.0, section 6.3).
    """
    blocks = x.float().unflatten(-1, (-1, 32))
    exponent = blocks.abs().amax(-1).view(torch.int32) >> 23
    scales = (exponent - 8).clamp(min=0)
    values = torch.ldexp(blocks, 127 - scales[..., None]).clamp(-448, 448)
    return values.flatten(-2).to(torch.float8_e4m3fn), scales.to(torch.uint8)


def as_mxfp8(x: Tensor) -> Tensor:
    """x [T, K] rounded to what ``quantize_mxfp8`` keeps of it."""
    values, scales = quantize_mxfp8(x)
    blocks = values.float().unflatten(-1, (-1, 32))
    return torch.ldexp(blocks, scales[..., None].int() - 127).flatten(-2).to(x.dtype)


def quantize_nvfp4(x: Tensor) -> NVFP4:
    """x [T, K], K a multiple of 16, as T matrices of one row: every row has a factor of its own, so
    that it does not depend on its batch."""
    most = x.float().abs().amax(-1).clamp(min=2.0**-100)
    packed = nvfp4.quantize(x[:, None], most / nvfp4.LARGEST)
    return NVFP4(packed.blocks[:, 0], packed.scales[:, 0], packed.factors)


def as_nvfp4(x: Tensor) -> Tensor:
    """x [T, K] rounded to what ``quantize_nvfp4`` keeps of it."""
    packed = quantize_nvfp4(x)
    rows = NVFP4(packed.blocks[:, None], packed.scales[:, None], packed.factors)
    return nvfp4.dequantize(rows, x.dtype)[:, 0]


def expert(w: Weights, e: int, dtype: torch.dtype) -> Tensor:
    """The matrix of local expert ``e``, dequantised if it is packed."""
    match w:
        case MXFP4():
            return mxfp4.dequantize(MXFP4(w.blocks[e], w.scales[e]), dtype)
        case NVFP4():
            return nvfp4.dequantize(NVFP4(w.blocks[e], w.scales[e], w.factors[e]), dtype)
        case Int4():
            return int4.dequantize(Int4(w.words[e], w.scales[e]), dtype)
    return w[e]
