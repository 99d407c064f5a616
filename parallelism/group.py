"""The ranks of one engine and what they do together: NCCL on CUDA devices, gloo on CPU."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

DEADLINE = timedelta(seconds=120)  # of every collective
SMALL = 1 << 18  # bytes up to which ranks read each other's memory; not tuned on a device

log = logging.getLogger(__name__)


class Symmetric:
    """Sums of few elements: every rank reads all ranks' copies in one kernel, over NVLink.

    Made of torch.distributed._symmetric_memory. By torch's source the kernel adds from the
    first rank to the last on every rank, rounding each time, so that all have the same bits.
    Nothing here waits for the device, so it can be captured in a CUDA graph. A kernel that waits
    for a rank that is gone cannot be aborted: it ends with its process. No GPU has run it.
    """

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        """Of ``size`` bytes; all ranks at once. Raises whatever torch does where the devices
        cannot reach each other's memory."""
        from torch.distributed import _symmetric_memory

        group = dist.group.WORLD
        assert group is not None, "join first"
        self._name = group.group_name
        self._buffer = _symmetric_memory.empty(size // dtype.itemsize, dtype=dtype, device=device)
        _symmetric_memory.rendezvous(self._buffer, group)

    def takes(self, x: Tensor) -> bool:
        """Depends on what all ranks share, so they choose alike."""
        fits = x.numel() <= self._buffer.numel() and x.nbytes % 16 == 0
        return fits and x.dtype == self._buffer.dtype and x.is_contiguous()

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum in a new tensor."""
        total: Tensor = torch.ops.symm_mem.one_shot_all_reduce_copy(
            self._buffer, x, "sum", self._name
        )
        return total


def symmetric(make: Callable[[], Symmetric], agree: Callable[[bool], bool]) -> Symmetric | None:
    """``make()`` if it works on every rank, else None on every rank, said in one line of the log.

    ``make`` is called by all at once; ``agree`` tells a rank whether all ranks were given True.
    """
    made, why = None, "another rank could not"
    try:
        made = make()
    except Exception as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())
    if agree(made is not None):
        return made
    log.warning("small sums over the ranks go through NCCL, not symmetric memory: %s", why)
    return None


class Group:
    """This process among the ranks. Alone, it needs no torch.distributed."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self._symmetric: Symmetric | None = None
        self._in_order = False

    def join(
        self,
        store: dist.Store,
        device: torch.device,
        most: int = 0,
        dtype: torch.dtype = torch.bfloat16,
        batch_invariant: bool = False,
    ) -> None:
        """Meet the other ranks over ``store``. Raises torch.distributed.DistError in time.

        ``most`` is the largest number of elements that ``all_reduce`` will get, in ``dtype``; how
        it sums on CUDA is chosen here, on all ranks alike.
        """
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
            device_id=device if device.type == "cuda" else None,
        )
        # With two ranks there is only one order.
        self._in_order = self.size > 2 and (device.type == "cpu" or batch_invariant)
        if device.type == "cuda" and most and not batch_invariant:

            def agree(mine: bool) -> bool:
                flag = torch.tensor(int(mine), device=device)
                dist.all_reduce(flag, dist.ReduceOp.MIN)
                return bool(flag.item())

            size = min(SMALL, most * dtype.itemsize)
            self._symmetric = symmetric(lambda: Symmetric(size, dtype, device), agree)

    def leave(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()

    def abort(self) -> None:
        """End NCCL's collectives that wait for ranks that failed; any thread may call it. Gloo's
        end on their own when a rank's process does."""
        if self.size > 1 and dist.is_initialized() and dist.get_backend() == "nccl":
            dist.distributed_c10d._abort_process_group()

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over the ranks, on every rank; may overwrite ``x``.

        On CPU, and in batch-invariant mode, every element is summed in the order of the ranks,
        wherever it lies in ``x``: gloo's and NCCL's own order depends on the size of ``x``, and a
        token's sum would depend on its batch.
        """
        if self.size == 1:
            return x
        if self._symmetric is not None and self._symmetric.takes(x):
            return self._symmetric.all_reduce(x)
        if not self._in_order:
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
