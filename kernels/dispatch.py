"""Which implementation of every kernel runs: chosen once at start, and said in a table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from kernels import cpu, exact, reference
from kernels.mxfp4 import MXFP4
from kernels.reference import Rows


class Plan(Protocol):
    """What an attention implementation prepares once per step and KV group; opaque but for this."""

    @property
    def slots(self) -> Tensor:
        """int64 [T]: where the step's new keys and values go."""


@dataclass(frozen=True, slots=True)
class Ops:
    """The kernels of one run. Shapes, dtypes and sources: ``kernels.reference``, same names."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    rope: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    kv_write: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]
    plan: Callable[[Rows, torch.device], Plan]
    paged_attention: Callable[[Tensor, Tensor, Tensor, Any, Tensor, float], Tensor]
    route: Callable[[Tensor, int], tuple[Tensor, Tensor]]
    experts: Callable[
        [
            Tensor,
            Tensor,
            Tensor,
            Tensor | MXFP4,
            Tensor,
            Tensor | MXFP4,
            Tensor | None,
            int,
            float,
            float,
        ],
        Tensor,
    ]
    table: tuple[tuple[str, str, str], ...]  # (op, implementation, why)


_NAMES = tuple(field.name for field in fields(Ops) if field.name != "table")


def choose(kernels: str, device: torch.device, dtype: torch.dtype) -> Ops:
    """The kernels for ``--kernels``, a device and an activation dtype (bf16 or fp32).

    Raises ValueError for a combination that does not exist, with what to choose instead.
    """
    if kernels == "triton":
        raise ValueError("--kernels triton is not available yet; use --kernels auto")
    if kernels == "cpu" and device.type != "cpu":
        raise ValueError(f"--kernels cpu cannot run on {device.type}; use --kernels auto")
    fp32 = dtype == torch.float32
    home: dict[str, tuple[ModuleType, str]] = {}
    if kernels == "reference" or device.type != "cpu":
        why = "asked for" if kernels == "reference" else f"no kernels for {device.type} yet"
        home = dict.fromkeys(_NAMES, (reference, why))
    for name in _NAMES:
        if name in home:
            continue
        if fp32 and hasattr(exact, name):
            home[name] = (exact, "float32: a row's result never depends on its batch")
        elif not fp32 and hasattr(cpu, name):
            home[name] = (cpu, f"{dtype}: few calls per layer")
        else:
            home[name] = (reference, "plain torch is best here")
    chosen: dict[str, Any] = {name: getattr(module, name) for name, (module, _) in home.items()}
    table = tuple(
        (name, module.__name__.rpartition(".")[2], why) for name, (module, why) in home.items()
    )
    return Ops(**chosen, table=table)
