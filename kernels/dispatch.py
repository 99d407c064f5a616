"""Which implementation of every kernel runs: chosen once at start, and said in a table."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from kernels import cpu, exact, reference
from kernels.reference import Draws, Put, Rows


class Plan(Protocol):
    """What an attention implementation prepares once per step and KV group; opaque but for this."""

    @property
    def slots(self) -> Tensor:
        """int64 [T]: where the step's new keys and values go; -1 for padding."""

    @property
    def key(self) -> Hashable:
        """What a captured graph depends on, of a plan that graphs can run."""


@dataclass(frozen=True, slots=True)
class Shapes:
    """What the choice depends on: one rank's part of a model, and how it runs."""

    dtype: torch.dtype  # of activations: bf16 or fp32
    heads: int
    kv_heads: int
    head_dim: int
    batch_invariant: bool = False
    arch: int = 0  # of the GPU: 90 is sm_90; 0 where there is none
    kv_dtype: torch.dtype | None = None  # of the KV cache; None: as activations; or fp8 (e4m3)


@dataclass(frozen=True, slots=True)
class Ops:
    """The kernels of one run. Shapes, dtypes and sources: ``kernels.reference``, same names."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    rope_kv_write: Callable[
        [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor
    ]
    plan: Callable[[Rows, Put], Plan]
    paged_attention: Callable[[Tensor, Tensor, Tensor, Any, Tensor, float], Tensor]
    route: Callable[[Tensor, int, Tensor], tuple[Tensor, Tensor]]
    pack: Callable[[Any], Any]
    experts: Callable[
        [Tensor, Tensor, Tensor, Any, Tensor, Any, Tensor | None, int, float, float], Tensor
    ]
    penalise: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
    sample: Callable[[Tensor, Draws], Tensor]
    table: tuple[tuple[str, str, str], ...]  # (op, implementation, why)


_NAMES = tuple(field.name for field in fields(Ops) if field.name != "table")
_Choice = dict[str, tuple[Any, str, str]]  # op -> (function, implementation, why)


def choose(kernels: str, device: torch.device, shapes: Shapes) -> Ops:
    """The kernels for ``--kernels`` on a device.

    Raises ValueError for a combination that does not exist, with what to choose instead.
    """
    kind = device.type
    if shapes.kv_dtype not in (None, shapes.dtype, torch.float8_e4m3fn):
        raise ValueError(
            f"no kernel has a KV cache in {shapes.kv_dtype} beside {shapes.dtype}; it can have "
            f"{shapes.dtype} or {torch.float8_e4m3fn}"
        )
    if kernels == "cpu" and kind != "cpu":
        raise ValueError(f"--kernels cpu cannot run on {kind}; use --kernels auto")
    if kernels == "reference":
        if shapes.batch_invariant:
            raise ValueError("--batch-invariant does not go with --kernels reference")
        chosen = _plain("asked for")
    elif kernels == "triton" or kind == "cuda":
        chosen = _triton("asked for" if kernels == "triton" else "the device is CUDA", kind, shapes)
    else:
        chosen = _cpu(shapes)
    table = tuple((name, home, why) for name, (_, home, why) in chosen.items())
    return Ops(**{name: function for name, (function, _, _) in chosen.items()}, table=table)


def _plain(why: str) -> _Choice:
    return {name: (getattr(reference, name), "reference", why) for name in _NAMES}


def _cpu(shapes: Shapes) -> _Choice:
    fp32 = shapes.dtype == torch.float32
    if shapes.batch_invariant and not fp32:
        raise ValueError("--batch-invariant on a CPU needs --dtype float32")
    own, name, why = (
        (exact, "exact", "float32: a row's result never depends on its batch")
        if fp32
        else (cpu, "cpu", f"{shapes.dtype}: few calls per layer")
    )
    chosen = _plain("plain torch is best here")
    return chosen | {op: (getattr(own, op), name, why) for op in _NAMES if hasattr(own, op)}


def _triton(why: str, kind: str, shapes: Shapes) -> _Choice:
    if kind == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            "--kernels triton needs a CUDA device (on a CPU, Triton's interpreter runs them, "
            "slowly, where TRITON_INTERPRET=1 is set); use --kernels auto"
        )
    if shapes.kv_dtype == torch.float8_e4m3fn and 0 < shapes.arch < 89:
        raise ValueError(
            f"--kv-cache-dtype fp8 needs sm_89 or newer, this GPU is sm_{shapes.arch}; use "
            "--kv-cache-dtype auto"
        )
    # Reads TRITON_INTERPRET, and takes a second: not where nobody asked for it.
    from kernels import attention, configurations, linear, moe, norm, packed, rope, sampling

    invariant = shapes.batch_invariant
    arch = configurations.family(shapes.arch)
    tiles = configurations.attention(
        arch, shapes.heads, shapes.kv_heads, shapes.head_dim, invariant
    )
    experts = configurations.experts(arch, invariant)
    # Activations of fp32 are there to be exact.
    native = arch == "blackwell" and shapes.dtype != torch.float32
    own: dict[str, Any] = {
        "rms_norm": norm.rms_norm,
        "add_rms_norm": norm.add_rms_norm,
        "rope_kv_write": rope.rope_kv_write,
        "plan": partial(attention.plan, config=tiles),
        "paged_attention": attention.paged_attention,
        "route": moe.route,
        "pack": partial(packed.pack, native=native),
        "experts": partial(moe.experts, config=experts),
        "penalise": sampling.penalise,
        "sample": sampling.sample,
    }
    if invariant:
        own["linear"] = partial(linear.linear, tile=configurations.linear(arch))
        why = f"{why}; batch-invariant tiles"
    chosen = _plain("the vendor's matrix product")
    return chosen | {op: (function, "triton", why) for op, function in own.items()}
