"""The ranks of one engine and what they do together: NCCL on CUDA devices, gloo on CPU."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

DEADLINE = timedelta(seconds=120)  # of every collective


class Group:
    """This process among the ranks. Alone, it needs no torch.distributed."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    def join(self, store: dist.Store, device: torch.device) -> None:
        """Meet the other ranks over ``store``. Raises torch.distributed.DistError in time."""
        if self.size == 1:
            return
        if device.type == "cpu" and getattr(store, "host", "") == "127.0.0.1":
            # gloo would look the host's own name up, which need not resolve.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore("moeray", store),
            rank=self.rank,
            world_size=self.size,
            timeout=DEADLINE,
        )

    def leave(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over the ranks, on every rank; may overwrite ``x``.

        On CPU every element is summed in the order of the ranks, wherever it lies in ``x``: gloo's
        own order depends on the size of ``x``, and a token's sum would depend on its batch. With
        two ranks there is only one order.
        """
        if self.size == 1:
            return x
        if self.size == 2 or x.device.type != "cpu":
            dist.all_reduce(x)
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x)
        total = parts[0].float()
        for other in parts[1:]:
            total += other
        return total.to(x.dtype)

    def gather(self, x: Tensor) -> list[Tensor]:
        """``x`` of every rank, on rank 0; elsewhere nothing. All must have the same shape."""
        if self.size == 1:
            return [x]
        parts = [torch.empty_like(x) for _ in range(self.size)] if self.rank == 0 else []
        dist.gather(x, parts or None)
        return parts

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        """``x`` of rank ``source`` on every rank; overwrites the others'."""
        if self.size > 1:
            dist.broadcast(x, source)
        return x
