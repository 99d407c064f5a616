"""Ahead of time: what is compiled without a GPU is what a model launches, and good machine code."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

from kernels import aot, configurations, linear, moe, norm
from kernels.configurations import FAMILIES, Tile
from kernels.launch import Launch, watched
from kernels.packed import Form, Packed
from tests.checkpoints import gpt_oss_config
from workers import dryrun
from workers.architecture import Architecture, parse
from workers.config import ModelSpec

ROOT = Path(__file__).parents[1]
BIG = ("gpt-oss-120b", "gpt-oss-20b")
DEFAULT = ModelSpec()
SLOW = pytest.mark.slow


def architecture(model: str) -> Architecture:
    return parse(gpt_oss_config(model))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


@cache
def launches(model: str, spec: ModelSpec, arch: int) -> list[Launch]:
    return dryrun.launches(architecture(model), spec, arch)


def gate(variant: aot.Variant, scratch: Path) -> list[str]:
    """What is wrong with a variant's machine code."""
    code = aot.inspect(variant, scratch)
    tile: Tile | None = variant.launch.tile
    found = [f"{code.spilled} bytes spilled"] if code.spilled else []
    if not code.occupancy:
        found.append(f"{code.registers} registers and {code.shared} bytes fit no multiprocessor")
    if tile is None:
        return found + ([f"undeclared products {code.products}"] if code.products else [])
    if code.kinds != {tile.products}:
        found.append(f"products are {code.products}, {tile.products} is declared")
    mains = [loop for loop in code.loops if loop.products]
    if not mains:
        found.append("no loop has products")
    # A product of 16 x 8 x 16 done with FFMA takes 64 a thread of a warp.
    found += [f"an FFMA main loop: {loop}" for loop in mains if loop.ffma > 4 * loop.products]
    found += [
        f"a main loop loads without async copies: {loop}" for loop in mains if not loop.copies
    ]
    return found


MATRIX = [
    pytest.param("gpt-oss-120b", DEFAULT, 90),
    pytest.param("gpt-oss-120b", DEFAULT, 100),
    *(
        pytest.param(model, spec, arch, marks=SLOW)
        for model in BIG
        for arch in FAMILIES
        for spec in (
            DEFAULT,
            ModelSpec(batch_invariant=True),
            ModelSpec(kv_cache_dtype="fp8"),
            ModelSpec(tensor_parallel_size=8),
            ModelSpec(tensor_parallel_size=8, enable_expert_parallel=True),
        )
        if (model, spec) != ("gpt-oss-120b", DEFAULT) or arch not in (90, 100)
        if spec.kv_cache_dtype == "auto" or arch >= 89
    ),
]


@pytest.mark.parametrize(("model", "spec", "arch"), MATRIX)
def test_machine_code(
    model: str, spec: ModelSpec, arch: int, directory: Path, tmp_path: Path
) -> None:
    variants = aot.compile(launches(model, spec, arch), arch, directory)
    wrong = [
        f"{variant.name} {variant.launch.options}: {fault}"
        for variant in variants
        for fault in gate(variant, tmp_path)
    ]
    assert not wrong, "\n".join(wrong)
    kernels = {variant.name for variant in variants}
    assert {"_attend", "_rope_kv_write", "_route"} <= kernels


def packed_launches(form: Form, tokens: int, arch: int) -> list[Launch]:
    """Llama-4 Scout's experts in INT4 and NVFP4; no model is served with them yet."""
    count, hidden, inner = 16, 5120, 8192
    config = configurations.experts(configurations.family(arch), invariant=False)
    found: list[Launch] = []
    with FakeTensorMode(), watched(found.append):

        def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
            return torch.empty(*shape, dtype=dtype, device="cuda")

        def weights(rows: int, depth: int) -> Packed:
            factors = empty(count, dtype=torch.float32)
            words = empty(count, rows, depth // 8, dtype=torch.int32)
            if form == "int4":
                return Packed(form, words, empty(count, rows, depth // 128))
            if form == "nvfp4":
                scales = empty(count, rows, depth // 64, dtype=torch.int32)
                return Packed(form, words, scales, factors)
            scales = empty(count, rows, depth // 16, dtype=torch.float8_e4m3fn)
            return Packed(form, words.view(torch.uint8), scales, factors)

        ids = empty(tokens, 1, dtype=torch.int32)
        moe.experts(
            empty(tokens, hidden), ids, empty(tokens, 1, dtype=torch.float32),
            weights(2 * inner, hidden), empty(count, 2 * inner), weights(hidden, inner),
            None, 0, 0.0, 0.0, plain=True, config=config,
        )  # fmt: skip
    return found


@pytest.mark.parametrize("tokens", [1, 512, 4096])
@pytest.mark.parametrize(
    ("form", "arch"),
    [
        ("int4", 80),
        ("int4", 90),
        ("int4", 100),
        ("nvfp4", 80),
        ("nvfp4", 90),
        ("nvfp4 x nvfp4", 100),
        ("nvfp4 x nvfp4", 103),
    ],
)
def test_machine_code_of_packed_experts(
    form: Form, tokens: int, arch: int, directory: Path, tmp_path: Path
) -> None:
    variants = aot.compile(packed_launches(form, tokens, arch), arch, directory)
    wrong = [f"{v.name} {v.launch.options}: {w}" for v in variants for w in gate(v, tmp_path)]
    assert not wrong, "\n".join(wrong)
    assert "_grouped" in {variant.name for variant in variants}


LOADER = """
import logging, sys
from pathlib import Path
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource

def refuse(*args, **kwargs):
    raise SystemExit("compiled")

CUDABackend.add_stages = ASTSource.make_ir = refuse
from kernels import aot
from workers import dryrun
from workers.config import ModelSpec
logging.basicConfig(level="WARNING")
configuration, arch, directory = sys.argv[1:]
aot.verify(Path(directory))
seen = set()
with aot.targeting(int(arch), Path(directory)):
    for launch in dryrun.launches(dryrun.configuration(configuration), ModelSpec(), int(arch)):
        seen.add(aot.warm(launch).hash)
print(len(seen))
"""


def load(configuration: Path, directory: Path) -> subprocess.CompletedProcess[str]:
    """Every variant from the directory, by a process whose compiler refuses to work."""
    return subprocess.run(
        [sys.executable, "-c", LOADER, str(configuration), "90", str(directory)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_shipped_cache_needs_no_compiler(tmp_path: Path) -> None:
    """Compiled by the command, moved to another place, and loaded where nothing can compile."""
    configuration = tmp_path / "config.json"
    configuration.write_text(json.dumps(gpt_oss_config("gpt-oss-20b")))
    made, moved = tmp_path / "made", tmp_path / "moved"
    command = ["moeray", "compile", "--arch", "sm_90", "--model", str(configuration)]
    subprocess.run(
        [sys.executable, "-m", *command, "--output", str(made)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=True,
        timeout=600,
    )
    shutil.move(made, moved)
    loaded = load(configuration, moved)
    assert loaded.returncode == 0, loaded.stderr
    assert int(loaded.stdout) == len(list(moved.glob("*/*.cubin")))
    assert "WARNING" not in loaded.stderr
    assert "compiled" in load(configuration, tmp_path / "empty").stderr


@pytest.fixture
def one() -> list[Launch]:
    """A launch of one small kernel."""
    seen: list[Launch] = []
    with FakeTensorMode(), watched(seen.append):
        x = torch.empty(5, 64, dtype=torch.bfloat16, device=dryrun.CUDA)
        norm.rms_norm(x, torch.empty(64, dtype=torch.bfloat16, device=dryrun.CUDA), 1e-5)
    return seen


def entry(directory: Path) -> Path:
    return next(directory.glob("*/*.cubin")).parent


def truncate(directory: Path, kind: str) -> None:
    file = next(entry(directory).glob(f"_*.{kind}"))
    file.write_bytes(file.read_bytes()[:100])


def another_triton(directory: Path) -> None:
    """Its own entry, whole, as an older moeray's manifest lists it."""
    file = next(entry(directory).glob("_rms*.json"))
    file.write_text(json.dumps(json.loads(file.read_text()) | {"triton_version": "2.0"}))
    manifest = directory / aot.MANIFEST
    found = json.loads(manifest.read_text())
    found["entries"] = {entry(directory).name: aot._sums(entry(directory))}
    manifest.write_text(json.dumps(found))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "cubin cut off": lambda at: truncate(at, "cubin"),
    "metadata cut off": lambda at: truncate(at, "json"),
    "cubin gone": lambda at: next(at.glob("*/*.cubin")).unlink(),
    "entry gone": lambda at: shutil.rmtree(entry(at)),
    "another Triton": another_triton,
    "manifest cut off": lambda at: (at / aot.MANIFEST).write_text("{"),
    "manifest of another kind": lambda at: (at / aot.MANIFEST).write_text('{"entries": [1]}'),
}


def test_nobody_waits_for_ever_for_a_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A start goes on with a warning; ``moeray compile`` ends with what to do."""
    monkeypatch.setattr(aot, "PATIENCE", 0.2)
    (tmp_path / aot.MANIFEST).write_text('{"entries": {}}')
    with (tmp_path / f"{aot.MANIFEST}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        aot.verify(tmp_path)
        assert "another process has held" in caplog.text
        with pytest.raises(TimeoutError, match="end it"):
            aot.compile([], 90, tmp_path)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_broken_cache_is_rebuilt(
    damage: str, one: list[Launch], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (first,) = aot.compile(one, 90, tmp_path)
    DAMAGE[damage](tmp_path)
    with caplog.at_level(logging.WARNING):
        (again,) = aot.compile(one, 90, tmp_path)
    assert again.cubin == first.cubin
    assert (
        json.loads(next(entry(tmp_path).glob("_rms*.json")).read_text())["triton_version"] != "2.0"
    )
    (said,) = caplog.messages
    assert "removed" in said or "anew" in said
    caplog.clear()
    aot.compile(one, 90, tmp_path)
    assert not caplog.messages


def test_others_entries_are_left_alone(one: list[Launch], tmp_path: Path) -> None:
    other = tmp_path / ("A" * 52)
    other.mkdir()
    (other / "kernel.cubin").write_text("of somebody else")
    aot.compile(one, 90, tmp_path)
    aot.verify(tmp_path)
    assert (other / "kernel.cubin").exists()


def test_specialisation_is_that_of_the_address(tmp_path: Path) -> None:
    """A tensor that begins between multiples of 16 bytes gets a kernel of its own."""
    seen: list[Launch] = []
    with FakeTensorMode(), watched(seen.append):
        w = torch.empty(64, dtype=torch.bfloat16, device=dryrun.CUDA)
        for first in (0, 8, 1):
            whole = torch.empty(100, dtype=torch.bfloat16, device=dryrun.CUDA)
            norm.rms_norm(whole.narrow(0, first, 64).view(1, 64), w, 1e-5)
    assert len(aot.compile(seen[:2], 90, tmp_path)) == 1
    assert len(aot.compile(seen, 90, tmp_path)) == 2


def test_refusals(one: list[Launch], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sm_75; they are for sm_80, sm_86, sm_89, sm_90"):
        aot.compile(one, 75, tmp_path)
    refused = subprocess.run(
        [sys.executable, "-m", "moeray", "compile", "--arch", "sm_90,sm_70"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert refused.returncode == 1
    assert "no kernel is made for sm_70" in refused.stderr
    assert not refused.stdout


def test_the_gate_can_close(tmp_path: Path) -> None:
    seen: list[Launch] = []
    with FakeTensorMode(), watched(seen.append):
        x = torch.empty(100, 128, dtype=torch.bfloat16, device=dryrun.CUDA)
        linear.linear(x, torch.empty_like(x), None, configurations.linear("hopper"))
    (variant,) = aot.compile(seen, 90, tmp_path)
    assert gate(variant, tmp_path) == []
    assert seen[0].tile is not None
    wrong = replace(seen[0], tile=replace(seen[0].tile, products="mma.sync"))
    assert "mma.sync is declared" in gate(replace(variant, launch=wrong), tmp_path)[0]
    undeclared = replace(variant, launch=replace(seen[0], tile=None))
    assert "undeclared" in gate(undeclared, tmp_path)[0]
