"""What the runner asks of a device beyond tensors: copies that wait for nobody, and graphs.

``Cuda`` is all of CUDA's streams, events, pinned memory and graphs that moeray uses. No GPU has run
it yet; ``tests.fakes.Replaying`` stands in for it where tests have none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

ALIGNED = 16  # bytes: Triton compiles for pointers that are multiples of it
RING = 3  # host buffers: one that is being filled, and one for each step that may be on its way


class Device(Protocol):
    """Steps go ``put`` ..., ``flush``, compute, ``fetch``; several may be on their way."""

    @property
    def graphs(self) -> bool:
        """Whether ``capture`` is to be used; what ``put`` returns then keeps its address."""

    @property
    def ahead(self) -> int:
        """How many steps may be launched before the first one is collected."""

    def put(self, tensor: Tensor) -> Tensor:
        """A host tensor's values on the device, once ``flush`` was called. The n-th one of a step
        lies where those of the same shapes and dtypes lay in steps before."""

    def flush(self) -> None: ...

    def send(self, tensor: Tensor) -> Tensor:
        """A host tensor of any size on the device, at an address of its own."""

    def fetch(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Start copying to the host; the call waits for it."""

    def capture(self, compute: Callable[[], object]) -> Callable[[], None]:
        """Record a computation; what is returned makes the device do it again."""


class Host:
    """A CPU: computing is launching, nothing is ever on its way."""

    graphs = False
    ahead = 1

    def put(self, tensor: Tensor) -> Tensor:
        return tensor

    def flush(self) -> None:
        pass

    def send(self, tensor: Tensor) -> Tensor:
        return tensor

    def fetch(self, tensor: Tensor) -> Callable[[], Tensor]:
        return lambda: tensor

    def capture(self, compute: Callable[[], object]) -> Callable[[], None]:
        raise NotImplementedError("a CPU has no graphs")


class Staging:
    """Host tensors packed into one buffer, and the device's copy of it.

    A host buffer is filled again only when the copy out of it is done, which is after RING - 1
    others; the device's is overwritten in stream order.
    """

    def __init__(self, size: int, device: torch.device, pinned: bool) -> None:
        self._host = [torch.empty(size, dtype=torch.uint8, pin_memory=pinned) for _ in range(RING)]
        self._device = torch.empty(size, dtype=torch.uint8, device=device)
        self._turn = self._used = 0

    def put(self, tensor: Tensor) -> Tensor:
        begin, end = self._used, self._used + tensor.nbytes
        if end > len(self._device):
            raise RuntimeError(f"a step's inputs take over {len(self._device)} bytes")
        self._used = -(-end // ALIGNED) * ALIGNED
        self._host[self._turn][begin:end].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        return self._device[begin:end].view(tensor.dtype).view(tensor.shape)

    def flush(self) -> int:
        """Start the copy; which host buffer it reads."""
        turn = self._turn
        filled = slice(0, self._used)
        self._device[filled].copy_(self._host[turn][filled], non_blocking=True)
        self._turn, self._used = (turn + 1) % RING, 0
        return turn


class Cuda:
    """One GPU. ``size``: bytes of all that a step ``put``s. ``graphs``: whether what will be
    computed can be captured."""

    ahead = 2

    def __init__(self, device: torch.device, size: int, graphs: bool) -> None:
        self.graphs = graphs
        self._staging = Staging(size, device, pinned=True)
        self._copied = [torch.cuda.Event() for _ in range(RING)]
        self._target = device
        self._pool = torch.cuda.graph_pool_handle()
        self._side = torch.cuda.Stream()  # one: cuBLAS keeps a workspace for each
        self._fresh = True

    def put(self, tensor: Tensor) -> Tensor:
        if self._fresh:
            self._copied[self._staging._turn].synchronize()
            self._fresh = False
        return self._staging.put(tensor)

    def flush(self) -> None:
        self._copied[self._staging.flush()].record()
        self._fresh = True

    def send(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory().to(self._target, non_blocking=True)

    def fetch(self, tensor: Tensor) -> Callable[[], Tensor]:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        done = torch.cuda.Event()
        done.record()

        def wait() -> Tensor:
            done.synchronize()
            return host

        return wait

    def capture(self, compute: Callable[[], object]) -> Callable[[], None]:
        # Once outside: libraries and Triton set themselves up at their first call.
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            compute()
        torch.cuda.current_stream().wait_stream(self._side)
        graph = torch.cuda.CUDAGraph()
        # NCCL's watchdog, in a thread of its own, may ask for events meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            compute()
        return graph.replay
