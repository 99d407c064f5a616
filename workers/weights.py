"""Reads a Hugging Face checkpoint: each rank its own bytes, and not one more.

``plan`` compares what the model declares with what the files' headers say, before a single weight
is read, and returns the reads as values; ``load`` carries them out, parameter by parameter.
Format of the files: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from parallelism.experts import Experts
from parallelism.layers import Sharded
from parallelism.shard import Slice
from workers.hub import CheckpointError

INDEX = "model.safetensors.index.json"
SAMPLES, SAMPLE = 16, 1 << 12  # of a file, for its fingerprint: how many, of so many bytes
MAX_HEADER = 100 << 20  # bytes, as in the format's own library
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8}


class Entry(msgspec.Struct):
    """A tensor as its file's header describes it."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


class Stored(msgspec.Struct, frozen=True):
    """A tensor and where its first byte lies."""

    file: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]


class Read(msgspec.Struct, frozen=True):
    """Bytes of one slice: runs of ``length`` bytes, repeated along every (count, stride)."""

    slice: Slice
    file: Path
    dtype: str
    offset: int
    repeats: tuple[tuple[int, int], ...]
    length: int

    @property
    def size(self) -> int:
        """Bytes to read."""
        return self.length * prod(count for count, _ in self.repeats)


class ReadPlan(msgspec.Struct, frozen=True):
    """All reads of one rank, by parameter."""

    reads: dict[str, tuple[Read, ...]]

    @property
    def size(self) -> int:
        """Bytes to read."""
        return sum(read.size for reads in self.reads.values() for read in reads)


def fingerprint(directory: Path) -> str:
    """Of all tensors' places and of some bytes of every file: equal for copies of a checkpoint.
    Raises CheckpointError."""
    digest = hashlib.sha256()
    tensors = stored_tensors(directory)
    for name, tensor in sorted(tensors.items()):
        place = (name, tensor.file.name, tensor.offset, tensor.dtype, tensor.shape)
        digest.update(repr(place).encode())
    for path in sorted({tensor.file for tensor in tensors.values()}):
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            for part in range(SAMPLES):
                file.seek(part * size // SAMPLES)
                digest.update(file.read(SAMPLE))
    return digest.hexdigest()[:16]


def stored_tensors(directory: Path) -> dict[str, Stored]:
    """Every tensor of the checkpoint, from the files' headers. Raises CheckpointError."""
    index = directory / INDEX
    if not index.exists():
        files = sorted(directory.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"{directory} holds no safetensors files")
        found: dict[str, Stored] = {}
        for file in files:
            for name, stored in _header(file).items():
                if name in found:
                    raise CheckpointError(f"tensor {name} is in both {found[name].file} and {file}")
                found[name] = stored
        return found
    where = _weight_map(index)
    headers = {}
    for file_name in sorted(set(where.values())):
        if not (directory / file_name).is_file():
            some = min(name for name, home in where.items() if home == file_name)
            raise CheckpointError(
                f"{directory / file_name} is missing; {INDEX} expects it to hold tensor {some}"
            )
        headers[file_name] = _header(directory / file_name)
    for file_name, tensors in headers.items():
        for name in tensors.keys() - where.keys():
            raise CheckpointError(
                f"tensor {name} in {directory / file_name} is not in the index {INDEX}"
            )
    for name, file_name in where.items():
        if name not in headers[file_name]:
            raise CheckpointError(
                f"tensor {name} is missing from {directory / file_name}, where {INDEX} expects it"
            )
    return {name: headers[file_name][name] for name, file_name in where.items()}


def _weight_map(index: Path) -> dict[str, str]:
    class Index(msgspec.Struct):
        weight_map: dict[str, str]

    try:
        return msgspec.json.decode(index.read_bytes(), type=Index).weight_map
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{index} is no index of safetensors files: {error}") from error


def _header(file: Path) -> dict[str, Stored]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise CheckpointError(f"{file} is truncated or no safetensors file")
        raw = stream.read(length)
    try:
        entries = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
        entries.pop("__metadata__", None)
        tensors = {name: msgspec.json.decode(raw, type=Entry) for name, raw in entries.items()}
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} has no readable safetensors header: {error}") from error
    found = {}
    for name, entry in tensors.items():
        first, last = entry.data_offsets
        if entry.dtype in _DTYPES:
            needed = prod(entry.shape) * _DTYPES[entry.dtype].itemsize
            if last - first != needed:
                raise CheckpointError(
                    f"tensor {name} in {file}: {last - first} bytes do not fit shape "
                    f"{list(entry.shape)} of {entry.dtype}"
                )
        if first < 0 or 8 + length + last > size:
            raise CheckpointError(
                f"tensor {name} in {file} is truncated: it ends at byte {8 + length + last}, the "
                f"file at {size}"
            )
        found[name] = Stored(file, 8 + length + first, entry.dtype, entry.shape)
    return found


def declared(model: nn.Module) -> Iterator[tuple[str, Sharded]]:
    """Parameters that are still to be loaded, by their name in the model."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if isinstance(parameter, Sharded):
            yield name, parameter


def plan(model: nn.Module, directory: Path, unused: frozenset[str] = frozenset()) -> ReadPlan:
    """What this rank reads. Raises CheckpointError for a tensor that is missing, of another shape
    or dtype, truncated, or of no use (but for those named in ``unused``)."""
    stored = stored_tensors(directory)
    reads: dict[str, tuple[Read, ...]] = {}
    used: set[str] = set()
    for name, parameter in declared(model):
        reads[name] = tuple(_read(part, stored, directory) for part in parameter.parts)
        used.update(part.name for part in parameter.parts)
    extra = sorted(stored.keys() - used - unused)
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise CheckpointError(
            f"tensor {extra[0]} in {stored[extra[0]].file}{more}: this architecture has no place "
            "for it; does config.json belong to these files?"
        )
    return ReadPlan(reads)


def _read(part: Slice, stored: Mapping[str, Stored], directory: Path) -> Read:
    found = stored.get(part.name)
    if found is None:
        raise CheckpointError(f"tensor {part.name} is missing from the files in {directory}")
    if found.shape != part.shape:
        raise CheckpointError(
            f"tensor {part.name} in {found.file} has shape {list(found.shape)}; config.json asks "
            f"for {list(part.shape)}"
        )
    if found.dtype not in _DTYPES or (found.dtype == "U8") is not part.packed:
        wanted = "U8" if part.packed else "BF16, F16 or F32"
        raise CheckpointError(
            f"tensor {part.name} in {found.file} has dtype {found.dtype}; expected {wanted}"
        )
    offset, repeats, length = part.runs(_DTYPES[found.dtype].itemsize)
    return Read(part, found.file, found.dtype, found.offset + offset, repeats, length)


def load(
    model: nn.Module,
    plan: ReadPlan,
    device: torch.device,
    dequantise: bool,
    progress: Callable[[int], None] = lambda size: None,
) -> None:
    """Fill the model. ``dequantise`` unpacks MXFP4 experts, layer by layer.

    ``progress`` hears of every number of bytes read.
    """
    maps: dict[Path, mmap.mmap] = {}
    for module_name, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not isinstance(parameter, Sharded):
                continue
            reads = plan.reads[f"{module_name}.{name}" if module_name else name]
            tensors = [_tensor(read, maps) for read in reads]
            whole = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
            whole = whole.to(device=device, dtype=parameter.dtype).contiguous()
            assert whole.shape == parameter.shape, f"{name}: {whole.shape}, {parameter.shape}"
            module._parameters[name] = nn.Parameter(whole, requires_grad=False)
            progress(sum(read.size for read in reads))
        if isinstance(module, Experts):
            module.finish(dequantise)


def _tensor(read: Read, maps: dict[Path, mmap.mmap]) -> Tensor:
    """The slice as a new tensor, in the dtype of the file."""
    tensor = torch.empty(read.slice.stored_shape, dtype=_DTYPES[read.dtype])
    if read.size:
        tensor.view(-1).view(torch.uint8).numpy()[:] = _bytes(read, maps)
    return tensor.transpose(-1, -2) if read.slice.transposed else tensor


def _bytes(read: Read, maps: dict[Path, mmap.mmap]) -> npt.NDArray[np.uint8]:
    if read.file not in maps:
        with read.file.open("rb") as file:
            maps[read.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    data = np.lib.stride_tricks.as_strided(
        np.frombuffer(maps[read.file], np.uint8)[read.offset :],
        (*(count for count, _ in read.repeats), read.length),
        (*(stride for _, stride in read.repeats), 1),
        writeable=False,
    )
    return data.ravel()
