"""The ranks of one engine, and those of all engines that share experts, and what they do together:
NCCL on CUDA devices, gloo on CPU."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

DEADLINE = timedelta(seconds=120)  # of every collective
POLL = timedelta(seconds=0.2)  # gloo cannot be interrupted: how long an abort takes to be seen
SMALL = 1 << 18  # bytes up to which ranks read each other's memory; not tuned on a device

log = logging.getLogger(__name__)


class Symmetric:
    """Sums of few elements: every rank reads all ranks' copies in one kernel, over NVLink.

    Made of torch.distributed._symmetric_memory. By torch's source the kernel adds from the
    first rank to the last on every rank, rounding each time, so that all have the same bits.
    Nothing here waits for the device, so it can be captured in a CUDA graph. A kernel that waits
    for a rank that is gone cannot be aborted: it ends with its process. No GPU has run it.
    """

    def __init__(
        self, size: int, dtype: torch.dtype, device: torch.device, group: dist.ProcessGroup
    ) -> None:
        """Of ``size`` bytes; all ranks of ``group`` at once. Raises whatever torch does where the
        devices cannot reach each other's memory."""
        from torch.distributed import _symmetric_memory

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


class Aborted(RuntimeError):
    """``Group.abort`` was called while a collective waited."""


class Group:
    """This process among the ``size`` ranks of its engine, and among those of all ``engines``.
    Alone, it needs no torch.distributed.

    ``progress`` says how far this rank is in what all engines do together: where a rank waits in
    vain, the ones that hold it up have a smaller number. On CUDA the host runs ahead of the device,
    and only whole steps are counted.
    """

    def __init__(self, rank: int = 0, size: int = 1, engine: int = 0, engines: int = 1) -> None:
        self.rank, self.size = rank, size
        self.progress = 0
        self._engine, self._engines = engine, engines
        self._ranks: dist.ProcessGroup | None = None  # the engine's
        self._symmetric: Symmetric | None = None
        self._in_order = False
        self._polls = self._aborted = False

    def join(
        self,
        store: dist.Store,
        device: torch.device,
        most: int = 0,
        dtype: torch.dtype = torch.bfloat16,
        batch_invariant: bool = False,
    ) -> None:
        """Meet the other ranks, of all engines, over ``store``. Raises torch.distributed.DistError
        in time.

        ``most`` is the largest number of elements that ``all_reduce`` will get, in ``dtype``; how
        it sums on CUDA is chosen here, on all ranks alike.
        """
        world = self.size * self._engines
        if world == 1:
            return
        if device.type == "cpu" and getattr(store, "host", "") == "127.0.0.1":
            # gloo would look the host's own name up, which need not resolve.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore("moeray", store),
            rank=self._engine * self.size + self.rank,
            world_size=world,
            timeout=DEADLINE,
            device_id=device if device.type == "cuda" else None,
        )
        self._ranks = dist.group.WORLD
        if self.size < world:
            # Every process must take part in the making of every group.
            for first in range(0, world, self.size):
                ranks = dist.new_group(list(range(first, first + self.size)), DEADLINE)
                if first == self._engine * self.size:
                    self._ranks = ranks
        assert self._ranks is not None
        self._polls = device.type == "cpu"
        # With two ranks there is only one order.
        self._in_order = self.size > 2 and (device.type == "cpu" or batch_invariant)
        if device.type == "cuda" and self.size > 1 and most and not batch_invariant:
            ranks = self._ranks

            def agree(mine: bool) -> bool:
                flag = torch.tensor(int(mine), device=device)
                dist.all_reduce(flag, dist.ReduceOp.MIN, group=ranks)
                return bool(flag.item())

            size = min(SMALL, most * dtype.itemsize)
            self._symmetric = symmetric(lambda: Symmetric(size, dtype, device, ranks), agree)

    def leave(self) -> None:
        if self._ranks is not None:
            dist.destroy_process_group()

    def abort(self) -> None:
        """End collectives that wait for ranks that failed; any thread may call it. They raise; no
        more may follow."""
        self._aborted = True
        if self._ranks is not None and not self._polls:
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
            self._await(dist.all_reduce(x, group=self._ranks, async_op=self._polls))
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        self._await(dist.all_gather(parts, x, group=self._ranks, async_op=self._polls))
        total = parts[0].float()
        for other in parts[1:]:
            total += other
        return total.to(x.dtype)

    def all_gather(self, x: Tensor) -> Tensor:
        """``x`` [n, ...] of every rank, on every rank: [size * n, ...] in their order. All must
        have the same shape."""
        out = x.new_empty(self.size * len(x), *x.shape[1:])
        self._await(dist.all_gather_single(out, x, group=self._ranks, async_op=self._polls))
        return out

    def gather(self, x: Tensor) -> list[Tensor]:
        """``x`` of every rank, on rank 0; elsewhere nothing. All must have the same shape."""
        if self.size == 1:
            return [x]
        parts = [torch.empty_like(x) for _ in range(self.size)] if self.rank == 0 else []
        work = dist.gather(x, parts or None, group=self._ranks, group_dst=0, async_op=self._polls)
        self._await(work)
        return parts

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        """``x`` of rank ``source`` on every rank; overwrites the others'."""
        if self.size > 1:
            self._await(
                dist.broadcast(x, group=self._ranks, group_src=source, async_op=self._polls)
            )
        return x

    # With the ranks of all engines.

    def begin(self, step: int) -> None:
        """The ``step``-th step of all engines begins, with fewer collectives than 65,536."""
        self.progress = step << 16

    def spread(self, x: Tensor) -> Tensor:
        """``x`` [n, ...] of every rank of all engines: [ranks * n, ...] in their order."""
        self.progress += self._polls
        out = x.new_empty(self.size * self._engines * len(x), *x.shape[1:])
        self._await(dist.all_gather_single(out, x, async_op=self._polls))
        return out

    def swap(
        self, x: Tensor, received: Sequence[int] | None = None, sent: Sequence[int] | None = None
    ) -> Tensor:
        """Rows of ``x`` to every rank of all engines, and theirs, in the order of the ranks.

        ``sent`` rows go to each and ``received`` come from each; None: equally many.
        """
        self.progress += self._polls
        out = x.new_empty(len(x) if received is None else sum(received), *x.shape[1:])
        self._await(
            dist.all_to_all_single(
                out,
                x.contiguous(),
                None if received is None else list(received),
                None if sent is None else list(sent),
                async_op=self._polls,
            )
        )
        return out

    def _await(self, work: dist.Work | None) -> None:
        """The end of a collective, where the host has to wait for it. Raises Aborted."""
        while work is not None:
            try:
                work.wait(POLL)
                return
            except RuntimeError:
                if work.is_completed():
                    work.wait()  # raises if it has failed, else only POLL had passed
                    return
                if self._aborted:
                    raise Aborted("other ranks were waited for in vain") from None
