"""Kernels compiled ahead of time, without a GPU, and what their machine code says.

Launches that ``kernels.launch.watched`` has seen go through Triton's own launch path up to the
compiler, under a driver that only names an architecture. So Triton's cache in the output directory
has the entries that a serving node will look for: same source, same argument specialisation, same
options. A manifest beside them lets a start find entries that are broken or another Triton's.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from kernels.configurations import family
from kernels.launch import Launch

MANIFEST = "moeray.json"
PATIENCE = 60.0  # seconds for another process to read or write the manifest
ALIGNED = 512  # bytes: every allocation of torch's CUDA allocator begins at a multiple
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Target:
    """As much of a Triton driver as compiling asks for."""

    arch: int

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # Triton keeps compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass(frozen=True, slots=True)
class _Address:
    """Stands in for a tensor where Triton looks for its dtype and alignment."""

    dtype: torch.dtype
    address: int

    def data_ptr(self) -> int:
        return self.address


@dataclass(frozen=True, slots=True)
class Variant:
    """A kernel as compiled for one architecture, and the first launch that wanted it."""

    launch: Launch
    arch: int
    entry: str  # the cache's folder of it
    name: str
    cubin: bytes
    shared: int  # bytes
    tensor_memory: int  # columns of 512
    warps: int


def compile(launches: Iterable[Launch], arch: int, directory: Path) -> list[Variant]:
    """Fill Triton's cache in ``directory`` for ``arch`` (90 is sm_90); equal launches count once.

    Entries that are there already are checked and reused. Raises ValueError for an architecture
    that no kernel is made for.
    """
    family(arch or -1)
    verify(directory)
    found: dict[str, Variant] = {}
    launches = list(launches)
    for each in {id(launch.kernel): launch.kernel for launch in launches}.values():
        getattr(each, "device_caches", {}).clear()  # in memory, of another directory
    with targeting(arch, directory):
        for launch in launches:
            kernel = warm(launch)
            if kernel.hash not in found:
                found[kernel.hash] = Variant(
                    launch,
                    arch,
                    Path(next(iter(kernel.metadata_group.values()))).parent.name,
                    kernel.name,
                    kernel.asm["cubin"],
                    kernel.metadata.shared,
                    getattr(kernel.metadata, "tmem_size", None) or 0,
                    kernel.metadata.num_warps,
                )
    with _locked(directory):
        entries = _manifest(directory) or {}
        entries |= {variant.entry: _sums(directory / variant.entry) for variant in found.values()}
        _write(directory, entries)
    return list(found.values())


def triton_directory() -> Path:
    """Where Triton keeps its cache: TRITON_CACHE_DIR, or a folder of its own."""
    return Path(knobs.cache.dir)


@contextmanager
def targeting(arch: int, directory: Path) -> Iterator[None]:
    """Within it Triton compiles for ``arch`` and keeps what it compiles in ``directory``."""
    before = driver._active
    with knobs.cache.scope(), knobs.compilation.scope():
        knobs.cache.dir = str(directory)
        knobs.compilation.store_binary_only = True
        driver.set_active(_Target(arch))
        try:
            yield
        finally:
            driver.set_active(before)


def warm(launch: Launch) -> Any:
    """The compiled kernel of a launch, from the cache or the compiler."""
    if not isinstance(launch.kernel, triton.JITFunction):
        raise ValueError("nothing can be compiled where TRITON_INTERPRET is set; unset it")
    arguments = [_address(a) if isinstance(a, torch.Tensor) else a for a in launch.arguments]
    return launch.kernel.warmup(*arguments, grid=launch.grid, **launch.options)


def _address(tensor: torch.Tensor) -> _Address:
    return _Address(tensor.dtype, ALIGNED + int(tensor.storage_offset()) * tensor.itemsize)


def verify(directory: Path | None = None) -> None:
    """Make a shipped cache fit for use: what is broken, or another Triton's, is removed with a
    warning, so that it is compiled anew; Triton's own lists of files get this directory's paths.

    The directory is by default Triton's own, from TRITON_CACHE_DIR. Without a manifest it is left
    alone.
    """
    directory = triton_directory() if directory is None else directory
    if not (directory / MANIFEST).exists():
        return
    try:
        with _locked(directory):
            _verify(directory)
    except OSError as error:
        log.warning("the kernel cache %s cannot be checked: %s", directory, error)


def _verify(directory: Path) -> None:
    entries = _manifest(directory)
    if entries is None:
        log.warning("the kernel cache %s has no readable manifest; compiling anew", directory)
        for folder in directory.iterdir():
            if re.fullmatch(r"[A-Z2-7]{52}", folder.name):
                shutil.rmtree(folder)
        _write(directory, {})
        return
    bad = [entry for entry, sums in entries.items() if not _whole(directory / entry, sums)]
    for entry in bad:
        log.warning("kernel cache entry %s is broken or another Triton's; removed", entry)
        shutil.rmtree(directory / entry, ignore_errors=True)
        del entries[entry]
    if bad:
        _write(directory, entries)
    for entry, sums in entries.items():
        for name in sums:
            if name.endswith(".json"):
                paths = {each: str((directory / entry / each).absolute()) for each in sums}
                group = directory / entry / f"__grp__{name}"
                text = json.dumps({"child_paths": paths})
                if not group.exists() or group.read_text() != text:
                    _replace(group, text)


def _whole(folder: Path, sums: dict[str, str]) -> bool:
    try:
        return bool(sums) and _sums(folder) == sums and _version(folder, sums) == triton.__version__
    except (OSError, ValueError):
        return False


def _version(folder: Path, sums: dict[str, str]) -> Any:
    name = next(name for name in sums if name.endswith(".json"))
    return json.loads((folder / name).read_text()).get("triton_version")


def _sums(folder: Path) -> dict[str, str]:
    """sha256 by file, but for the lists of absolute paths that Triton keeps."""
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.iterdir())
        if file.is_file() and not file.name.startswith("__grp__")
    }


def _manifest(directory: Path) -> dict[str, dict[str, str]] | None:
    """Files' sums by entry; None where there is no manifest or it cannot be read."""
    try:
        entries = json.loads((directory / MANIFEST).read_text())["entries"]
        return {str(entry): dict(sums) for entry, sums in entries.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _write(directory: Path, entries: dict[str, dict[str, str]]) -> None:
    text = json.dumps({"triton": triton.__version__, "entries": entries}, indent=1, sort_keys=True)
    _replace(directory / MANIFEST, text)


def _replace(file: Path, text: str) -> None:
    """Whole or not at all, whoever reads it meanwhile."""
    fresh = file.with_name(f"{file.name}.{os.getpid()}")
    fresh.write_text(text)
    fresh.replace(file)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Ranks of one node start together on one cache. Raises TimeoutError."""
    directory.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + PATIENCE
    with (directory / f"{MANIFEST}.lock").open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(
                        f"another process has held {file.name} for {PATIENCE:.0f} s; end it"
                    ) from None
                time.sleep(0.1)
        yield


# Per multiprocessor: registers, bytes of shared memory (one block's reserve included), warps.
_LIMITS = {
    80: (65536, 164 << 10, 64),
    86: (65536, 100 << 10, 48),
    89: (65536, 100 << 10, 48),
    90: (65536, 228 << 10, 64),
    100: (65536, 228 << 10, 64),
    103: (65536, 228 << 10, 64),
    120: (65536, 100 << 10, 48),
}
RESERVED = 1 << 10  # bytes of shared memory that every block costs beyond its own
# Opcode -> the kind of product it is, and the configuration's word for it.
_PRODUCTS = {
    "HMMA": "mma.sync",
    "QMMA": "mma.sync",
    "OMMA": "mma.sync",
    "IMMA": "mma.sync",
    "HGMMA": "wgmma",
    "QGMMA": "wgmma",
    "UTCHMMA": "tcgen05",
    "UTCQMMA": "tcgen05.block_scale",
    "UTCOMMA": "tcgen05.block_scale",
}
_COPIES = {"UTMALDG": "TMA", "LDGSTS": "cp.async"}


@dataclass(frozen=True, slots=True)
class Code:
    """What a variant's machine code is made of. Counts are of instructions as written."""

    registers: int  # of a thread
    spilled: int  # bytes of a thread's stack
    shared: int  # bytes of a block
    tensor_memory: int  # columns of 512
    occupancy: int  # blocks of a multiprocessor
    warps: int  # of a block
    products: dict[str, int]  # by opcode
    kinds: frozenset[str]  # as ``configurations.Products``
    ffma: int
    copies: dict[str, int]  # "TMA", "cp.async"
    loads: dict[int, int]  # by bits of a thread's load
    loops: tuple[Loop, ...]


@dataclass(frozen=True, slots=True)
class Loop:
    """An innermost loop: opcode counts."""

    products: int
    ffma: int
    copies: int


def inspect(variant: Variant, scratch: Path) -> Code:
    """Read a variant's machine code with the disassembler in Triton's wheel; ``scratch`` is a
    folder for the file it wants."""
    file = scratch / f"{variant.entry}.cubin"
    file.write_bytes(variant.cubin)
    usage = _tool("cuobjdump", "-res-usage", str(file))
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))  # type: ignore[index]
    text = _tool("nvdisasm", "-c", str(file))
    opcodes = [opcode for _, opcode, _ in _instructions(text)]
    names = Counter(opcode.split(".")[0] for opcode in opcodes)
    products = {name: names[name] for name in _PRODUCTS if names[name]}
    total, memory, most = _LIMITS[variant.arch]
    threads = 32 * variant.warps
    occupancy = min(
        total // (-(-registers // 8) * 8 * threads),
        memory // (variant.shared + RESERVED),
        most // variant.warps,
    )
    loads: Counter[int] = Counter()
    for opcode in opcodes:
        if opcode.startswith("LDG."):
            wide = re.search(r"\.(64|128|256)\b", opcode)
            loads[int(wide[1]) if wide else 32] += 1
    return Code(
        registers,
        stack,
        variant.shared,
        variant.tensor_memory,
        occupancy,
        variant.warps,
        products,
        frozenset(_PRODUCTS[name] for name in products),
        names["FFMA"] + names["FFMA2"],
        {kind: names[name] for name, kind in _COPIES.items() if names[name]},
        dict(sorted(loads.items())),
        _loops(text),
    )


def row(variant: Variant, scratch: Path) -> dict[str, str | int]:
    """A variant's line in a report."""
    code = inspect(variant, scratch)
    options = variant.launch.options
    sizes = [f"{options[name]}" for name in ("ROWS", "COLUMNS", "KEYS", "DEPTH") if name in options]
    flags = [str(options["FORM"])] if "FORM" in options else []
    flags += [
        f"{name.lower()} {value}" if value is not True else name.lower()
        for name, value in options.items()
        if name in ("WINDOW", "CHUNK", "SPAN", "SPLIT", "UP", "ADD", "FP8") and value
    ]
    counted = [f"{number} {name}" for name, number in code.products.items()]
    return {
        "kernel": variant.name.lstrip("_"),
        "arch": f"sm_{variant.arch}",
        "tile": " x ".join(sizes),
        "form": ", ".join(flags),
        "warps": code.warps,
        "registers": code.registers,
        "spilled": code.spilled,
        "shared": code.shared,
        "tensor memory": code.tensor_memory,
        "blocks": code.occupancy,
        "products": ", ".join(counted),
        "FFMA": code.ffma,
        "copies": ", ".join(f"{number} {name}" for name, number in code.copies.items()),
        "loads": ", ".join(f"{number} x {bits} b" for bits, number in code.loads.items()),
    }


def _instructions(text: str) -> Iterator[tuple[str, str, str]]:
    """(label that precedes it or "", opcode, operands)."""
    label = ""
    for line in text.splitlines():
        if named := re.match(r"\s*(\.L_x_\d+):", line):
            label = named[1]
        elif found := re.search(
            r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]+)([^;]*);", line
        ):
            yield label, found[1], found[2]
            label = ""


def _loops(text: str) -> tuple[Loop, ...]:
    """Ranges between a label and a branch back to it that hold no other such range."""
    instructions = list(_instructions(text))
    at = {label: i for i, (label, _, _) in enumerate(instructions) if label}
    ranges = set()
    for i, (_, opcode, operands) in enumerate(instructions):
        target = re.search(r"\.L_x_\d+", operands)
        if opcode.split(".")[0] == "BRA" and target and at.get(target[0], i) < i:
            ranges.add((at[target[0]], i))
    inner = [
        (a, b)
        for a, b in sorted(ranges)
        if not any((a, b) != (c, d) and a <= c and d <= b for c, d in ranges)
    ]
    loops = []
    for first, last in inner:
        opcodes = [opcode for _, opcode, _ in instructions[first : last + 1]]
        names = Counter(opcode.split(".")[0] for opcode in opcodes)
        loops.append(
            Loop(
                sum(names[name] for name in _PRODUCTS),
                names["FFMA"] + names["FFMA2"],
                sum(names[name] for name in _COPIES),
            )
        )
    return tuple(loops)


@cache
def _path(tool: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool)


def _tool(tool: str, *arguments: str) -> str:
    done = subprocess.run(
        [_path(tool), *arguments], capture_output=True, text=True, check=True, timeout=120
    )
    return done.stdout
