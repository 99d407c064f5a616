"""The training twin of the gpt-oss decoder: whole sequences, autograd, bf16 on fp32 masters.

Gate and up rows are kept as halves here and interleaved on export. Experts run as one padded
batched product per layer, which two CPU cores like better than a loop.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BF16 = torch.bfloat16
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class Size:
    vocab: int
    hidden: int = 128
    intermediate: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    experts: int = 8
    top_k: int = 2
    window: int = 32
    max_position: int = 4096
    rope_theta: float = 150000.0
    rope_factor: float = 32.0
    original_position: int = 4096


def rope_tables(size: Size) -> tuple[Tensor, Tensor]:
    """YaRN without truncation: cos and sin [max_position, head_dim / 2], concentration included."""
    index = torch.arange(0, size.head_dim, 2).double() / size.head_dim
    base = size.rope_theta**-index

    def turns(count: float) -> float:
        wavelength = size.original_position / (count * 2 * math.pi)
        return size.head_dim * math.log(wavelength) / (2 * math.log(size.rope_theta))

    low, high = turns(32.0), turns(1.0)
    ramp = ((torch.arange(size.head_dim // 2) - low) / (high - low)).clamp(0, 1)
    inverse = (base * (1 - ramp) + base / size.rope_factor * ramp).float()
    angle = torch.arange(size.max_position).float()[:, None] * inverse
    concentration = 0.1 * math.log(size.rope_factor) + 1
    return angle.cos() * concentration, angle.sin() * concentration


def mxfp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise fp32 [..., in] in blocks of 32: (e2m1 codes uint8 [..., in/32, 32], E8M0 scales).

    The scale is max/6 rounded up to a power of two, so nothing saturates; ties go to even codes.
    """
    blocks = weight.float().unflatten(-1, (-1, 32))
    needed = blocks.abs().amax(-1) / 6
    exponent = (needed.view(torch.int32) + 0x007FFFFF) >> 23 & 0xFF
    scale = (exponent << 23).view(torch.float32)[..., None]
    scaled = torch.where(scale > 0, blocks / scale, 0.0)
    size = scaled.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    rounded = torch.round(size / step) * step
    codes = torch.searchsorted(torch.tensor(E2M1), rounded) | (torch.signbit(scaled).long() << 3)
    return codes.to(torch.uint8), exponent.to(torch.uint8)


class StraightThrough(torch.autograd.Function):
    """MXFP4 rounding forward, identity backward."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        codes, exponent = mxfp4(weight)
        sign = 1 - 2 * (codes >> 3).float()
        size = torch.tensor(E2M1)[(codes & 7).long()]
        return (sign * size * (exponent.int() << 23).view(torch.float32)[..., None]).flatten(-2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def rounded(weight: Tensor) -> Tensor:
    result: Tensor = StraightThrough.apply(weight)  # type: ignore[no-untyped-call]
    return result


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight.to(BF16), None if bias is None else bias.to(BF16))


class Layer(nn.Module):
    """Attention with sinks, then a mixture of experts; a window on even layers."""

    def __init__(self, size: Size, index: int) -> None:
        super().__init__()
        self.size, self.sliding, self.quantise = size, index % 2 == 0, False
        h, d, inter, experts = size.hidden, size.head_dim, size.intermediate, size.experts
        width = (size.heads + 2 * size.kv_heads) * d
        self.attention_norm = nn.Parameter(torch.ones(h))
        self.mlp_norm = nn.Parameter(torch.ones(h))
        self.qkv = nn.Parameter(torch.randn(width, h) * 0.6 / math.sqrt(h))
        self.qkv_bias = nn.Parameter(torch.zeros(width))
        self.out = nn.Parameter(torch.randn(h, size.heads * d) * 0.6 / math.sqrt(h))
        self.out_bias = nn.Parameter(torch.zeros(h))
        self.sinks = nn.Parameter(torch.zeros(size.heads))
        self.router = nn.Parameter(torch.randn(experts, h) * 0.02)
        self.router_bias = nn.Parameter(torch.zeros(experts))
        self.gate_up = nn.Parameter(torch.randn(experts, 2 * inter, h) * 0.7 / math.sqrt(h))
        self.gate_up_bias = nn.Parameter(torch.zeros(experts, 2 * inter))
        self.down = nn.Parameter(torch.randn(experts, h, inter) * 0.5 / math.sqrt(inter))
        self.down_bias = nn.Parameter(torch.zeros(experts, h))

    def attention(
        self, x: Tensor, cos: Tensor, sin: Tensor, masks: tuple[Tensor, Tensor]
    ) -> Tensor:
        """x [B, L, h] bf16 -> [B, L, h] bf16."""
        size, (b, length, _) = self.size, x.shape
        heads, kv, d = size.heads, size.kv_heads, size.head_dim
        qkv = linear(x, self.qkv, self.qkv_bias).view(b, length, heads + 2 * kv, d)
        turned, v = qkv[:, :, : heads + kv].float(), qkv[:, :, heads + kv :]
        first, second = turned.chunk(2, -1)
        c, s = cos[:length, None], sin[:length, None]
        turned = torch.cat((first * c - second * s, second * c + first * s), -1).to(BF16)
        q = turned[:, :, :heads].unflatten(2, (kv, heads // kv)).permute(0, 2, 3, 1, 4)
        k = turned[:, :, heads:].permute(0, 2, 3, 1)
        group = heads // kv
        q = q.reshape(b * kv, group * length, d)
        scores = torch.bmm(q, k.reshape(b * kv, d, length)).float() * d**-0.5
        scores = scores.view(b, kv, group, length, length) + masks[self.sliding]
        sinks = self.sinks.view(kv, group, 1, 1).expand(b, kv, group, length, 1)
        weights = torch.cat((scores, sinks), -1).softmax(-1)[..., :-1].to(BF16)
        values = v.transpose(1, 2).reshape(b * kv, length, d)
        mixed = torch.bmm(weights.reshape(b * kv, group * length, length), values)
        mixed = mixed.view(b, heads, length, d).transpose(1, 2).reshape(b, length, heads * d)
        return linear(mixed, self.out, self.out_bias)

    def experts(self, x: Tensor, losses: list[Tensor] | None) -> Tensor:
        """x [N, h] bf16 -> [N, h] fp32; appends the load-balancing and router z losses."""
        size, n = self.size, x.shape[0]
        logits = linear(x, self.router).float() + self.router_bias
        top, ids = logits.topk(size.top_k, -1)
        weights = top.softmax(-1)
        with torch.no_grad():
            flat = ids.flatten()
            chosen = F.one_hot(flat, size.experts)
            counts = chosen.sum(0)
            capacity = (int(counts.max()) + 63) // 64 * 64
            slots = flat * capacity + chosen.cumsum(0).gather(1, flat[:, None])[:, 0] - 1
            source = torch.full((size.experts * capacity,), n)
            source[slots] = torch.arange(n).repeat_interleave(size.top_k)
        if losses is not None:
            share = counts.float() / flat.numel()
            balance = size.experts * (share * logits.softmax(-1).mean(0)).sum()
            losses.append(0.01 * balance + 1e-4 * logits.logsumexp(-1).square().mean())
        gate_up = rounded(self.gate_up) if self.quantise else self.gate_up
        down = rounded(self.down) if self.quantise else self.down
        padded = F.pad(x, (0, 0, 0, 1)).index_select(0, source).view(size.experts, capacity, -1)
        inner = torch.baddbmm(
            self.gate_up_bias.to(BF16)[:, None], padded, gate_up.to(BF16).transpose(1, 2)
        )
        gate, up = inner.chunk(2, -1)
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        inner = gate * torch.sigmoid(1.702 * gate) * (up + 1)
        y = torch.baddbmm(self.down_bias.to(BF16)[:, None], inner, down.to(BF16).transpose(1, 2))
        y = y.flatten(0, 1).index_select(0, slots).view(n, size.top_k, -1)
        return (y.float() * weights[..., None]).sum(1)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        masks: tuple[Tensor, Tensor],
        losses: list[Tensor] | None,
    ) -> Tensor:
        x = x + self.attention(norm(x, self.attention_norm), cos, sin, masks)
        return x + self.experts(norm(x, self.mlp_norm).flatten(0, 1), losses).view(x.shape)


def norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm in fp32, then bf16."""
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight).to(BF16)


class Decoder(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        self.embedding = nn.Parameter(torch.randn(size.vocab, size.hidden))
        self.layers = nn.ModuleList(Layer(size, index) for index in range(size.layers))
        self.norm = nn.Parameter(torch.ones(size.hidden))
        self.head = nn.Parameter(torch.randn(size.vocab, size.hidden) * 0.5 / size.hidden**0.5)
        self.cos, self.sin = rope_tables(size)

    def forward(self, ids: Tensor, at: Tensor, losses: list[Tensor] | None = None) -> Tensor:
        """ids [B, L], at [M] flat positions -> logits [M, vocab] fp32 at those positions."""
        length = ids.shape[1]
        distance = torch.arange(length)[:, None] - torch.arange(length)
        causal = torch.where(distance >= 0, 0.0, -torch.inf)
        window = torch.where(distance < self.size.window, causal, -torch.inf)
        x = F.embedding(ids, self.embedding)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin, (causal, window), losses)
        return linear(norm(x.flatten(0, 1).index_select(0, at), self.norm), self.head).float()

    def quantise(self, on: bool) -> None:
        for layer in self.layers:
            assert isinstance(layer, Layer)
            layer.quantise = on
