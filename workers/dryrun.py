"""A model on fake CUDA tensors: what a rank launches, sends and holds, without a GPU or weights.

A fake tensor has a device, a dtype and a shape, but no memory. The model's real code runs on them,
and so do the kernels' host sides, whose launches are watched. It shows mixed devices, wrong shapes
and dtypes, and whatever in a step would wait for the device. It cannot show what streams, events
and graph capture do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import traffic
from kernels.launch import Launch, watched
from kernels.reference import Draws, Rows
from kernels.traffic import Work
from parallelism.experts import Experts
from parallelism.group import Group
from parallelism.layers import Place
from parallelism.layout import Layout
from workers import hub
from workers import rank as ranks
from workers.architecture import Architecture, Yarn, layout, parse
from workers.capacity import default_batched_tokens
from workers.config import KVConfig, ModelSpec
from workers.kvcache import KVCache
from workers.model import Decoder
from workers.sampler import log_softmax

CUDA = torch.device("cuda", 0)


class HostWait(AssertionError):
    """A step reads from the device, which makes the host wait for it."""


@dataclass(frozen=True, slots=True)
class Step:
    """What one step of a rank did."""

    launches: list[Launch]
    collectives: list[tuple[str, Tensor]]
    logits: Tensor
    experts: Tensor  # their slots [layers, T, k]


class Recorder(Group):
    """The other ranks' stand-in: collectives keep their shapes, and a list of them is kept."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)
        self.seen: list[tuple[str, Tensor]] = []

    def all_reduce(self, x: Tensor) -> Tensor:
        if self.size > 1:
            self.seen.append(("all_reduce", x))
        return x

    def gather(self, x: Tensor) -> list[Tensor]:
        if self.size > 1:
            self.seen.append(("gather", x))
        return [torch.empty_like(x) for _ in range(self.size)] if self.rank == 0 else []

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        if self.size > 1:
            self.seen.append(("broadcast", x))
        return x


class Dry:
    """One rank of a model on a GPU of architecture ``arch`` (90 is sm_90). ``spec`` says how it
    runs; its ``model`` is not read. Raises ValueError for what cannot run."""

    def __init__(self, architecture: Architecture, spec: ModelSpec, arch: int, rank: int) -> None:
        self.architecture, self._spec = architecture, spec
        grid = layout(architecture, spec, rank)
        self.group = Recorder(rank, grid.tp)
        self._mode = FakeTensorMode()
        ops = ranks.kernels(architecture, grid, spec, CUDA, arch)
        ops = replace(ops, pack=_one(ops.pack))
        dtype, _ = ranks.dtypes(spec)
        self._place = Place(grid, self.group, ops, dtype, CUDA)
        with self._mode, _Reads(lambda name: 0):
            self.model = Decoder(architecture, self._place)
            self.stored_bytes = sum(p.nbytes for p in self.model.parameters())
            _materialise(self.model)
            self.cache = self._kv_cache(grid)

    def _kv_cache(self, grid: Layout) -> KVCache:
        """Large enough for any step of ``steps``; a fake tensor takes no room."""
        arch, spec = self.architecture, self._spec
        _, dtype = ranks.dtypes(spec)
        groups = arch.kv_groups(spec.block_size, grid.tp, dtype.itemsize)
        blocks = -(-arch.max_position // spec.block_size) + spec.max_num_seqs
        first, last = grid.heads(arch.num_kv_heads)
        config = KVConfig(groups, blocks, spec.block_size)
        return KVCache(config, last - first, arch.head_dim, dtype, CUDA)

    def _on_device(self, tensor: Tensor) -> Tensor:
        with self._mode:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device=CUDA)

    @property
    def held_bytes(self) -> int:
        """Of the weights, in the form in which the kernels read them."""
        return ranks.held(self.model)

    def step(self, rows: Sequence[tuple[int, int]]) -> Step:
        """Run rows of (start, count). Raises HostWait where the host would wait for the device."""
        starts, counts = torch.tensor(rows).unbind(1)
        cache, model = self.cache, self.model
        blocks = -(-int((starts + counts).max()) // cache.config.block_size)
        tables = torch.arange(blocks, dtype=torch.int32).expand(len(rows), blocks)
        plans = []
        for group in cache.config.groups:
            of = Rows(
                starts=starts,
                counts=counts,
                lines=torch.arange(len(rows)),
                tables=tables,
                resident=self._on_device(tables),
                tokens=int(counts.sum()),
                block_size=cache.config.block_size,
                zero_block=cache.zero_block,
                window=group.size if group.kind == "window" else 0,
                chunk=group.size if group.kind == "chunk" else 0,
            )
            plans.append(model.ops.plan(of, self._on_device))
        tokens = int(counts.sum())
        launches: list[Launch] = []
        self.group.seen = []
        with self._mode, torch.inference_mode(), _Reads(_refuse), _Stays():
            ids, positions = (torch.empty(tokens, dtype=torch.int64, device=CUDA) for _ in "ab")
            last = torch.empty(len(rows), dtype=torch.int64, device=CUDA)
            with watched(launches.append):
                logits, experts = model(ids, positions, plans, cache, last)
        return Step(launches, self.group.seen, logits, experts)

    def sample(self, logits: Tensor) -> list[Launch]:
        """What choosing tokens launches: greedy, drawn, filtered, with penalties and biases.
        Raises HostWait, also for what log probabilities do."""
        launches: list[Launch] = []
        ops, rows = self.model.ops, len(logits)
        with (
            self._mode,
            torch.inference_mode(),
            _Reads(_refuse),
            _Stays(),
            watched(launches.append),
        ):
            columns = torch.empty(9, -(-rows // 4) * 4, dtype=torch.int32, device=CUDA)
            columns = columns.narrow(1, 0, rows)
            floats = columns.narrow(0, 0, 6).view(torch.float32)
            counts = torch.empty(2, logits.shape[1], dtype=torch.int32, device=CUDA)
            lines = torch.empty(rows, dtype=torch.int64, device=CUDA)
            wide = ops.penalise(logits, counts, lines, *floats[3:])
            for scores in (logits, wide):
                for filtered in (False, True):
                    keys = torch.empty(rows, 2, dtype=torch.int32, device=CUDA)
                    rest = (floats[0], columns[6], floats[1], floats[2], keys)
                    tokens = ops.sample(scores, Draws(*rest, None, True, filtered))
            log_softmax(logits, lines, tokens, 20)
        return launches


GPT_OSS_120B = Architecture(
    vocab_size=201088,
    hidden_size=2880,
    intermediate_size=2880,
    num_layers=36,
    num_heads=64,
    num_kv_heads=8,
    head_dim=64,
    num_experts=128,
    experts_per_token=4,
    windows=(128, 0) * 18,
    max_position=131072,
    rope_theta=150000.0,
    rope_scaling=Yarn(factor=32.0, original_max_position=4096, truncate=False),
    mxfp4=True,
    eos_token_ids=(200002,),
)


def configuration(model: str) -> Architecture:
    """Of a config.json, or of what ``workers.hub`` takes, without its weights. Raises NoModel,
    CheckpointError, UnsupportedModel."""
    file = Path(model).expanduser()
    if file.is_file():
        return parse(hub.read_json(file))
    return hub.architecture(hub.resolve(model, weights=False))


def decode(
    architecture: Architecture, spec: ModelSpec, arch: int, rows: int, context: int
) -> dict[str, tuple[int, Work]]:
    """By kernel: launches of one step of rank 0 in which ``rows`` sequences decode behind
    ``context`` tokens each, and their work together."""
    dry = Dry(architecture, spec, arch, 0)
    found: dict[str, tuple[int, Work]] = {}
    for launch in dry.step([(context, 1)] * rows).launches:
        name = launch.kernel.__name__.lstrip("_")
        if "UP" in launch.options:
            name += " up" if launch.options["UP"] else " down"
        if launch.options.get("WINDOW"):
            name += f" window {launch.options['WINDOW']}"
        number, work = found.get(name, (0, Work(0, 0, 0)))
        more = traffic.work(launch, context, architecture.experts_per_token)
        found[name] = number + 1, work + more
    size = dry._place.dtype.itemsize
    dense = [
        p for name, p in dry.model.named_parameters() if "experts." not in name and p.dim() == 2
    ]
    weights = sum(p.numel() for p in dense) - dry.model.embed.weight.numel()
    found["dense layers"] = (
        3 * architecture.num_layers + 1,
        Work(weights * size, weights * size, 2 * weights * rows),
    )
    return found


def launches(architecture: Architecture, spec: ModelSpec, arch: int) -> list[Launch]:
    """Everything that the ranks of a model launch, over all shape classes of a step.

    Layers of one kind launch the same kernels, so there is one layer of each kind here.
    """
    kinds = tuple(sorted(set(architecture.windows)))
    architecture = msgspec.structs.replace(architecture, num_layers=len(kinds), windows=kinds)
    found: list[Launch] = []
    for rank in range(spec.tensor_parallel_size):
        dry = Dry(architecture, spec, arch, rank)
        for rows in steps(architecture, spec):
            step = dry.step(rows)
            found += step.launches
            if rank == 0:
                found += dry.sample(step.logits)
    return found


def steps(architecture: Architecture, spec: ModelSpec) -> Iterator[list[tuple[int, int]]]:
    """Rows (start, count) of steps that reach every choice which the kernels' host code makes: by
    tokens (powers of two up to what a step may have), rows, and the length of what they see."""
    longest = (spec.max_model_len or architecture.max_position) - 1
    budget = min(default_batched_tokens(spec, True), longest)
    for start in {0, min(longest, 300), longest}:
        for rows in _powers(spec.max_num_seqs):
            yield [(start, 1)] * rows
    for tokens in _powers(budget):
        if tokens > 1:
            yield [(0, tokens)]
            yield [(longest - tokens, tokens)]
            yield [(0, tokens - 1), (longest, 1)]


def _powers(limit: int) -> list[int]:
    """1, 2, 4 .. and ``limit``."""
    return [1 << i for i in range(limit.bit_length()) if 1 << i < limit] + [limit]


def _materialise(model: nn.Module) -> None:
    """What ``weights.load`` does, but for the reading."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.device.type == "meta":
                data = torch.empty(parameter.shape, dtype=parameter.dtype, device=CUDA)
                module._parameters[name] = nn.Parameter(data, requires_grad=False)
        if isinstance(module, Experts):
            module.finish(dequantise=False)


def _one(pack: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """``pack``, which goes through every expert, of one expert only, grown to all of them."""

    def packed(w: Any) -> Any:
        one = _each(w, lambda t: t.narrow(0, 0, 1))
        result = pack(one)
        if result is one:
            return w
        experts = len(w if isinstance(w, Tensor) else w.blocks)

        def grow(tensor: Tensor) -> Tensor:
            assert tensor.shape[0] == 1, "packed weights are kept by expert"
            assert tensor.is_contiguous()
            return tensor.new_empty(experts, *tensor.shape[1:])

        return _each(result, grow)

    return packed


def _each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with every tensor in it changed."""
    if isinstance(value, Tensor):
        return change(value)
    if is_dataclass(value) and not isinstance(value, type):
        changed = {f.name: _each(getattr(value, f.name), change) for f in fields(value)}
        return replace(value, **changed)
    return value


def _refuse(name: str) -> int:
    raise HostWait(f"{name} waits for the device")


_READS = (
    "__int__",
    "__float__",
    "__bool__",
    "__index__",
    "item",
    "tolist",
    "cpu",
    "numpy",
    "nonzero",
)


class _Reads(TorchFunctionMode):
    """What Tensor's Python methods do to fake CUDA tensors: ``answer`` has the value of a read.

    A few are spelt out, since a torch without CUDA wants a device behind the tensor for them.
    """

    def __init__(self, answer: Callable[[str], int]) -> None:
        super().__init__()
        self._answer = answer

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(function, "__name__", "")
        on_device = bool(args) and isinstance(args[0], Tensor) and args[0].is_cuda
        if on_device and name in _READS:
            return self._answer(name)
        if on_device and name in _SPELT:
            return _SPELT[name](*args)
        if on_device and name == "__setitem__":
            x, key, value = args
            chosen, indices = _view(x, key)
            value = value if isinstance(value, Tensor) else torch.full((), value, dtype=x.dtype)
            if indices:
                return torch.ops.aten.index_put_(chosen, indices, value)
            return torch.ops.aten.copy_(chosen, value)
        return function(*args, **(kwargs or {}))


def _index(x: Tensor, key: Any) -> Tensor:
    chosen, indices = _view(x, key)
    return torch.ops.aten.index.Tensor(chosen, indices) if indices else chosen


def _view(x: Tensor, key: Any) -> tuple[Tensor, list[Tensor | None]]:
    """x[key], but for the tensors in it, which are returned by dimension."""
    keys = list(key) if isinstance(key, tuple) else [key]
    if any(each is ... for each in keys):
        at = next(i for i, each in enumerate(keys) if each is ...)
        rest = sum(each is not None for each in keys) - 1
        keys[at : at + 1] = [slice(None)] * (x.dim() - rest)
    dimension = 0
    indices: list[Tensor | None] = []
    for each in keys:
        if isinstance(each, int):
            x = x.select(dimension, each)
            continue
        if each is None:
            x = x.unsqueeze(dimension)
        elif isinstance(each, slice):
            x = torch.ops.aten.slice(x, dimension, each.start, each.stop, each.step or 1)
        else:
            indices += [None] * (dimension - len(indices))
            indices.append(each)
        dimension += 1
    return x, indices


_SPELT: dict[str, Callable[..., Tensor]] = {
    "__getitem__": _index,
    "__invert__": torch.bitwise_not,
    "copy_": torch.ops.aten.copy_,
}


class _Stays(TorchDispatchMode):
    """Nothing in it goes from the device to the host, whichever way it is written."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        inputs = _flat(args)
        if function._overloadpacket in _WAITS and any(t.is_cuda for t in inputs):
            _refuse(str(function))
        into_host = any(not t.is_cuda for t in _flat((out,)))
        if into_host and any(t.is_cuda for t in inputs):
            _refuse(str(function))
        return out


_WAITS = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.is_nonzero)


def _flat(values: Iterable[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, tuple | list):
            found += _flat(value)
    return found
