"""One rank of an engine, from a ModelSpec to something that runs steps. No Ray, no threads."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import msgspec
import psutil
import torch
from torch.distributed import DistStoreError, Store

from kernels.dispatch import Ops, Shapes, choose
from parallelism.experts import Experts
from parallelism.group import Group
from parallelism.layers import Place
from parallelism.layout import Layout
from parallelism.placement import ExpertLoad, PlacementError
from workers import hub, weights
from workers.architecture import Architecture, layout
from workers.capacity import (
    Capacity,
    capacity,
    default_batched_tokens,
    default_kv_bytes,
    device_room,
)
from workers.config import KVConfig, ModelSpec, SchedulerConfig
from workers.device import Cuda, Host
from workers.grammar import Grammars
from workers.kvcache import KVCache
from workers.model import Decoder
from workers.recording import nothing, placement
from workers.runner import Runner, inputs_bytes
from workers.scheduler import Scheduler

DTYPES = {"auto": torch.bfloat16, "bfloat16": torch.bfloat16, "float32": torch.float32}


LOAD = 3600.0  # seconds for the weights of the slowest rank
SLICE = timedelta(seconds=2)  # of a wait that ``abort`` can end
SHARED = (  # fields of a ModelSpec on which the exchanges, or a token's bits, depend
    "tensor_parallel_size",
    "data_parallel_size",
    "enable_expert_parallel",
    "dtype",
    "kernels",
    "batch_invariant",
    "kv_cache_dtype",
    "max_num_seqs",
    "max_num_batched_tokens",
)


class RankReport(msgspec.Struct, frozen=True, kw_only=True):
    """What one rank is and holds; shown at start-up and by ``moeray status``."""

    rank: int
    pid: int
    node: str
    device: str
    threads: int
    weight_bytes: int
    free_bytes: int  # for the KV cache at most, on the rank of all engines that has the least
    kv_dtype_bytes: int
    seconds: float  # to load
    notes: list[str] = []


def dtypes(spec: ModelSpec) -> tuple[torch.dtype, torch.dtype]:
    """Of activations, and of keys and values."""
    dtype = DTYPES[spec.dtype]
    return dtype, torch.float8_e4m3fn if spec.kv_cache_dtype == "fp8" else dtype


def kernels(
    arch: Architecture, layout: Layout, spec: ModelSpec, device: torch.device, capability: int
) -> Ops:
    """A rank's kernels; ``capability`` is 90 for sm_90. Raises ValueError for what there is not."""
    heads, kv_heads = (
        last - first for first, last in map(layout.heads, (arch.num_heads, arch.num_kv_heads))
    )
    dtype, kv_dtype = dtypes(spec)
    shapes = Shapes(
        dtype, heads, kv_heads, arch.head_dim, spec.batch_invariant, capability, kv_dtype
    )
    return choose(spec.kernels, device, shapes)


class Rank:
    """Call ``load``, ``plan``, ``allocate`` in this order. ``spec.model`` is a directory."""

    def __init__(self, spec: ModelSpec, rank: int = 0, engine: int = 0) -> None:
        self._spec, self._directory = spec, Path(spec.model)
        self.architecture = arch = hub.architecture(self._directory)
        self._layout = layout(arch, spec, rank, engine)
        self._placement = placement(spec, arch)
        self._layers = self._placement.layers if self._placement is not None else None
        cuda = spec.device == "cuda" or (spec.device == "auto" and torch.cuda.is_available())
        self._device = torch.device("cuda", 0) if cuda else torch.device("cpu")
        self._dtype, self._kv_dtype = dtypes(spec)
        if not cuda:
            _keep_freed_memory()
        self._grammars: Grammars | None = None  # rank 0's
        self._place: Place | None = None
        self._model: Decoder | None = None
        self._store: Store | None = None  # of all ranks
        self._aborted = False

    def load(
        self, store: Store | None, progress: Callable[[int, int], None] = lambda done, of: None
    ) -> RankReport:
        """Join the other ranks, of all engines, over ``store`` and read this rank's weights.

        ``progress`` hears (bytes read, of so many). Raises CheckpointError and PlacementError
        before anything is read.
        """
        began = time.monotonic()
        arch = self.architecture
        ops = kernels(arch, self._layout, self._spec, self._device, _capability(self._device))
        if self._device.type == "cuda" and self._spec.kernels != "reference":
            from kernels import aot  # imports Triton

            aot.verify()
        grid = self._layout
        group = Group(grid.rank, grid.tp, grid.dp_rank, grid.dp)
        place = Place(grid, group, ops, self._dtype, self._device, self._layers)
        model = Decoder(arch, place)
        unused = frozenset({"lm_head.weight"}) if arch.tie_word_embeddings else frozenset()
        plan = weights.plan(model, self._directory, unused)
        if store is not None:
            most = arch.hidden_size * default_batched_tokens(
                self._spec, self._device.type == "cuda"
            )
            group.join(store, self._device, most, self._dtype, self._spec.batch_invariant)
        dequantise, notes = self._form_of_experts(model)
        self._check_room(model, dequantise)
        if self._layout.rank == 0:
            self._grammars = Grammars(self._directory, arch.vocab_size, arch.eos_token_ids)
        done = 0

        def advance(size: int) -> None:
            nonlocal done
            done += size
            progress(done, plan.size)

        weights.load(model, plan, self._device, dequantise, advance)
        self._place, self._model, self._store = place, model.eval(), store
        if self._device.type == "cuda":
            # The rehearsal has collectives, and their deadline is shorter than a slow disk's.
            self._share("loaded", 0)
        return RankReport(
            rank=self._layout.rank,
            pid=os.getpid(),
            node=platform.node(),
            device=str(self._device),
            threads=torch.get_num_threads(),
            weight_bytes=held(model),
            free_bytes=min(self._share("free", self._room())),
            kv_dtype_bytes=self._kv_dtype.itemsize,
            seconds=time.monotonic() - began,
            notes=[*notes, self._form_of_kv(), *_kernels(ops)],
        )

    def _share(self, what: str, value: int) -> list[int]:
        """``value`` of every rank of all engines, once all have come here."""
        if self._store is None:
            return [value]
        self._store.set(f"{what} {self._layout.ep_rank}", str(value))
        everybody = [f"{what} {rank}" for rank in range(self._layout.world)]
        end = time.monotonic() + LOAD
        while True:
            try:
                self._store.wait(everybody, SLICE)
                return [int(self._store.get(name)) for name in everybody]
            except DistStoreError:
                if self._aborted or time.monotonic() > end:
                    raise

    def _form_of_experts(self, model: Decoder) -> tuple[bool, list[str]]:
        """Whether to dequantise MXFP4 experts at load, and a line that says what that costs."""
        unpacked = sum(m.unpacked_bytes for m in model.modules() if isinstance(m, Experts))
        if not unpacked:
            return False, []
        packed = unpacked // self._dtype.itemsize * 17 // 32
        sizes = f"{_size(packed)} as MXFP4, {_size(unpacked)} as {str(self._dtype)[6:]}"
        if self._device.type == "cuda" or self._spec.kernels == "triton":
            return False, [f"experts stay packed ({sizes})"]
        if unpacked <= self._free() // 2:
            return True, [f"experts are dequantised at load: {sizes}"]
        return False, [f"experts stay packed and are dequantised on every use, slower ({sizes})"]

    def _check_room(self, model: Decoder, dequantise: bool) -> None:
        """Raise PlacementError where a placement puts more experts here than there is memory."""
        blocks = [m for m in model.modules() if isinstance(m, Experts)]
        count = sum(m.count for m in blocks)
        if self._placement is None or not count:
            return
        size = sum(m.bytes(dequantise) for m in blocks)
        others = sum(p.nbytes for p in model.parameters()) - sum(m.bytes(False) for m in blocks)
        room = self._free() - others - (self._spec.kv_cache_memory or 0)
        try:
            self._placement.fit(size // count, max(0, room), self._layout.ep_rank)
        except PlacementError as error:
            file = self._spec.expert_placement
            raise PlacementError(f"--expert-placement {file}: {error}") from error

    def _form_of_kv(self) -> str:
        """A line that says what the KV cache is made of and what a token costs in it."""
        first, last = self._layout.heads(self.architecture.num_kv_heads)
        elements = 2 * self.architecture.num_layers * (last - first) * self.architecture.head_dim
        line = (
            f"KV cache in {str(self._kv_dtype)[6:]}: {elements * self._kv_dtype.itemsize:,} bytes "
            "per token on each rank, over all layers"
        )
        if self._kv_dtype == self._dtype:
            return line
        return (
            f"{line}, instead of {elements * self._dtype.itemsize:,} in {str(self._dtype)[6:]}; "
            "no scales, values beyond 448 saturate"
        )

    def _free(self) -> int:
        """Bytes this rank may still take; ranks on CPU are taken to share one node."""
        if self._device.type == "cuda":
            return torch.cuda.mem_get_info(self._device)[0]
        return int(psutil.virtual_memory().available) // self._layout.world

    def _room(self) -> int:
        """Bytes for the KV cache: on CUDA, what the largest step leaves of this rank's share."""
        if self._device.type != "cuda":
            return self._free()
        tokens = default_batched_tokens(self._spec, cuda=True)
        groups = self.architecture.kv_groups(
            self._spec.block_size, self._spec.tensor_parallel_size, self._kv_dtype.itemsize
        )
        block = KVConfig(groups, 1, self._spec.block_size)
        config = SchedulerConfig(
            max_num_seqs=self._spec.max_num_seqs,
            max_num_batched_tokens=tokens,
            max_model_len=max(
                tokens + 1, self._spec.max_model_len or self.architecture.max_position
            ),
            eos_token_ids=(),
        )
        before = torch.cuda.memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        self._runner(block, config, graphs=False).rehearse(tokens)
        torch.cuda.synchronize(self._device)
        peak = torch.cuda.max_memory_allocated(self._device) - before
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self._device)
        return device_room(total, free, peak, self._spec.gpu_memory_utilization)

    def plan(self, free: int) -> Capacity:
        """The KV pool where every rank has ``free`` bytes. Raises TooLittleMemory."""
        cuda = self._device.type == "cuda"
        return capacity(
            self.architecture,
            self._spec,
            default_kv_bytes(free, self._spec, cuda),
            self._kv_dtype.itemsize,
            default_batched_tokens(self._spec, cuda),
        )

    def facts(self) -> dict[str, str]:
        """What all ranks of engines that share experts must have in common. Raises
        CheckpointError."""
        spec = msgspec.to_builtins(self._spec)
        config = (self._directory / "config.json").read_bytes()
        return {field: str(spec[field]) for field in SHARED} | {
            "device": self._device.type,
            "torch": str(torch.__version__),
            "config.json": hashlib.sha256(config).hexdigest()[:16],
            "weights": weights.fingerprint(self._directory),
            "expert_placement": hashlib.sha256(repr(self._layers).encode()).hexdigest()[:16],
        }

    @property
    def progress(self) -> int:
        """How far this rank is in what it does with all others."""
        return 0 if self._place is None else self._place.group.progress

    def abort(self) -> None:
        """Let no wait for other ranks hold this process; nothing runs here afterwards."""
        self._aborted = True
        if self._place is not None:
            self._place.group.abort()

    @property
    def grammars(self) -> Grammars:
        """Rank 0's, once loaded."""
        assert self._grammars is not None, "load first"
        return self._grammars

    def scheduler(self, plan: Capacity) -> Scheduler:
        """Rank 0's."""
        return Scheduler(plan.scheduler, plan.kv, self._spec.revision, str(self._kv_dtype))

    def nothing(self) -> ExpertLoad:
        """The experts' load before the first token."""
        assert self._model is not None, "load first"
        arch = self.architecture
        blocks = [m for m in self._model.modules() if isinstance(m, Experts)]
        size = sum(t.nbytes for m in blocks for t in (*m.matrices, m.b13, m.b2))
        cuts = 1 if self._spec.enable_expert_parallel else self._spec.tensor_parallel_size
        return nothing(
            self._directory,
            self._spec.served_model_name or self._directory.name,
            arch.num_layers,
            arch.num_experts,
            size * cuts // max(1, sum(m.count for m in blocks)),
        )

    def allocate(self, plan: Capacity) -> Runner:
        """Take the KV cache's memory, and capture graphs where there are any. All ranks of all
        engines are ready when it returns."""
        runner = self._runner(plan.kv, plan.scheduler, graphs=self._spec.kernels != "reference")
        runner.capture()
        self._share("ready", 0)
        return runner

    def _runner(self, kv: KVConfig, config: SchedulerConfig, graphs: bool) -> Runner:
        assert self._model is not None, "load first"
        assert self._place is not None, "load first"
        first, last = self._layout.heads(self.architecture.num_kv_heads)
        cache = KVCache(kv, last - first, self.architecture.head_dim, self._kv_dtype, self._device)
        device = (
            Cuda(self._device, inputs_bytes(config), graphs)
            if self._device.type == "cuda"
            else Host()
        )
        return Runner(self._model, cache, config, self._place, device, self._grammars)


def _capability(device: torch.device) -> int:
    """90 for sm_90; 0 for a CPU."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _keep_freed_memory() -> None:
    """Have glibc keep what is freed: page faults on activations made a prefill step 1.4 to 2 times
    as long, as it hands large blocks back to the kernel and gets them again for every layer."""
    with contextlib.suppress(AttributeError):  # another libc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD: bytes on top of the heap
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD: the most it takes


def _kernels(ops: Ops) -> list[str]:
    """Lines that say which kernels run, and why."""
    by: dict[tuple[str, str], list[str]] = {}
    for op, implementation, why in ops.table:
        by.setdefault((implementation, why), []).append(op)
    return [f"{home} kernels ({why}): {', '.join(names)}" for (home, why), names in by.items()]


def held(model: Decoder) -> int:
    """Bytes of the weights."""
    found: dict[int, torch.Tensor] = {id(p): p for p in model.parameters()}
    for module in model.modules():
        if isinstance(module, Experts):
            found |= {id(t): t for t in module.matrices}
    return sum(tensor.nbytes for tensor in found.values())


def _size(size: int) -> str:
    return f"{size / (1 << 30):.2f} GiB" if size >= 1 << 30 else f"{size / (1 << 20):.1f} MiB"
