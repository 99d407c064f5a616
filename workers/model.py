"""The gpt-oss decoder on one rank, over the tokens of one step.

Shapes: T tokens of all sequences in the step, D hidden size, H and KV heads of this rank, d head
size, k experts per token. Source: the gpt-oss model card, arXiv:2508.10925.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kernels.dispatch import Plan
from parallelism.exchange import Exchange
from parallelism.experts import Experts
from parallelism.layers import (
    HeadLinear,
    HeadVector,
    Linear,
    Place,
    RowLinear,
    Vector,
    VocabEmbedding,
    VocabHead,
)
from workers.architecture import Architecture, Llama3, Yarn
from workers.kvcache import KVCache


class Block(nn.Module):
    """One layer: attention, then a mixture of experts, each behind a norm."""

    def __init__(self, arch: Architecture, layer: int, place: Place, exchange: Exchange) -> None:
        super().__init__()
        name = f"model.layers.{layer}."
        self.d, self.scale, self.eps = arch.head_dim, arch.head_dim**-0.5, arch.rms_norm_eps
        self.k = arch.experts_per_token
        self.ops, self.group, self.exchange = place.ops, place.group, exchange
        attention = name + "self_attn."
        hidden = arch.hidden_size
        self.norm = Vector(name + "input_layernorm.weight", hidden, place)
        kv_heads = arch.num_kv_heads
        projections = [("q_proj", arch.num_heads), ("k_proj", kv_heads), ("v_proj", kv_heads)]
        self.qkv = HeadLinear(
            [(attention + part, heads) for part, heads in projections], hidden, self.d, place
        )
        self.sinks = HeadVector(attention + "sinks", arch.num_heads, place)
        self.o = RowLinear(attention + "o_proj", arch.num_heads, self.d, hidden, place)
        self.expert_norm = Vector(name + "post_attention_layernorm.weight", hidden, place)
        self.router = Linear(name + "mlp.router", hidden, arch.num_experts, place)
        self.experts = Experts(
            name + "mlp.experts",
            experts=arch.num_experts,
            hidden=hidden,
            intermediate=arch.intermediate_size,
            mxfp4=arch.mxfp4,
            limit=arch.swiglu_limit,
            alpha=arch.swiglu_alpha,
            place=place,
            places=place.placement[layer] if place.placement else None,
        )

    def forward(
        self,
        x: Tensor,
        delta: Tensor | None,
        rotation: tuple[Tensor, Tensor],
        cache: tuple[Tensor, Tensor],
        plan: Plan,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, D] without the last block's output ``delta`` [T, D] -> (x, delta, slots [T, k])."""
        ops = self.ops
        if delta is None:
            h = ops.rms_norm(x, self.norm.weight, self.eps)
        else:
            h, x = ops.add_rms_norm(delta, x, self.norm.weight, self.eps)
        q, k, v = self.qkv(h)
        q = ops.rope_kv_write(q, k, v, *rotation, *cache, plan.slots)
        h = ops.paged_attention(q, *cache, plan, self.sinks.weight, self.scale)
        delta = self.group.all_reduce(self.o(h))
        h, x = ops.add_rms_norm(delta, x, self.expert_norm.weight, self.eps)
        ids, weights = ops.route(self.router(h), self.k, plan.slots)
        slots = self.experts.slots(ids)
        return x, self.exchange(self.experts, h, slots, weights), slots

    def assist(self, h: Tensor) -> None:
        """With no token of its own, h [0, D]: this rank's experts for the tokens of others."""
        slots = h.new_empty(0, self.k, dtype=torch.int64)
        self.exchange(self.experts, h, slots, h.new_empty(0, self.k, dtype=torch.float32))


class Decoder(nn.Module):
    """Token ids to logits. Weights come from workers.weights; caches and plans from the runner."""

    def __init__(self, arch: Architecture, place: Place) -> None:
        super().__init__()
        self.arch, self.ops = arch, place.ops
        self.embed = VocabEmbedding("model.embed_tokens", arch.vocab_size, arch.hidden_size, place)
        self.exchange = Exchange(place.layout, place.group)
        self.blocks = nn.ModuleList(
            Block(arch, i, place, self.exchange) for i in range(arch.num_layers)
        )
        self.norm = Vector("model.norm.weight", arch.hidden_size, place)
        head = "model.embed_tokens" if arch.tie_word_embeddings else "lm_head"
        self.head = VocabHead(head, arch.vocab_size, arch.hidden_size, place)
        self.rotary = Rotary(arch, place)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        plans: Sequence[Plan],
        cache: KVCache,
        last: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Logits [S, vocabulary] at the rows ``last`` int64 [S], and in which slots the experts
        were that computed the tokens, int [layers, T, k].

        tokens, positions int64 [T]; ``plans`` by KV group. The caches take the new keys and values.
        """
        x = self.embed(tokens)
        rotation = self.rotary(positions)
        delta: Tensor | None = None
        routed = []
        for i, block in enumerate(self.blocks):
            plan = plans[cache.group_of[i]]
            x, delta, slots = block(x, delta, rotation, cache.layer(i), plan)
            routed.append(slots)
        assert delta is not None
        h, _ = self.ops.add_rms_norm(
            delta.index_select(0, last),
            x.index_select(0, last),
            self.norm.weight,
            self.arch.rms_norm_eps,
        )
        return self.head(h), torch.stack(routed)

    def assist(self) -> None:
        """Take part in a step of other engines, without tokens of this one."""
        none = self.norm.weight.new_empty(0, self.arch.hidden_size)
        for block in self.blocks:
            assert isinstance(block, Block)
            block.assist(none)


class Rotary:
    """cos and sin of every position as ``rope`` takes them, computed in fp32, rounded once."""

    def __init__(self, arch: Architecture, place: Place) -> None:
        frequencies, factor = inverse_frequencies(arch)
        angles = torch.arange(arch.max_position, dtype=torch.float32)[:, None] * frequencies
        cos, sin = angles.cos() * factor, angles.sin() * factor
        self.cos = torch.cat((cos, cos), -1).to(place.device, place.dtype)[:, None]
        self.sin = torch.cat((-sin, sin), -1).to(place.device, place.dtype)[:, None]

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """[T] -> cos, sin [T, 1, d]."""
        return self.cos.index_select(0, positions), self.sin.index_select(0, positions)


def inverse_frequencies(arch: Architecture) -> tuple[Tensor, float]:
    """Rotary frequencies fp32 [d/2] in radians per position, and the factor on cos and sin.

    YaRN (arXiv:2309.00071): dimensions that turn more than beta_fast times within the original
    context keep their frequency, those below beta_slow are stretched by ``factor``, and those in
    between are blended linearly by their index, Llama 3.1's (arXiv:2407.21783) by their turns.
    Scores grow by the square of the returned factor.
    """
    d, theta, scaling = arch.head_dim, arch.rope_theta, arch.rope_scaling
    frequencies = theta ** -(torch.arange(0, d, 2, dtype=torch.float32) / d)
    if scaling is None:
        return frequencies, 1.0
    stretched = frequencies / scaling.factor
    if isinstance(scaling, Llama3):
        turns = frequencies * scaling.original_max_position / (2 * math.pi)
        band = max(scaling.high - scaling.low, 1e-6)  # Scout has none
        kept = ((turns - scaling.low) / band).clamp(0, 1)
        return frequencies * kept + stretched * (1 - kept), 1.0
    return _yarn(scaling, frequencies, stretched, theta)


def _yarn(yarn: Yarn, frequencies: Tensor, stretched: Tensor, theta: float) -> tuple[Tensor, float]:
    d = 2 * len(frequencies)

    def dimension(turns: float) -> float:
        """The pair that turns so many times within the original context."""
        return (
            d * math.log(yarn.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(theta))
        )

    low, high = dimension(yarn.beta_fast), dimension(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, d - 1)
    ramp = ((torch.arange(d // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    blended = frequencies * (1 - ramp) + stretched * ramp
    return blended, 0.1 * math.log(yarn.factor) + 1 if yarn.factor > 1 else 1.0
