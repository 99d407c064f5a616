"""The house keeps its order: who imports whom, and what the pure ring may know."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("kernels", "parallelism", "workers", "cluster")  # each may import those before it
PURE = (
    "workers/wire.py",
    "workers/config.py",
    "workers/architecture.py",
    "workers/blocks.py",
    "workers/sequence.py",
    "workers/scheduler.py",
    "workers/capacity.py",
    "workers/rounds.py",
    "parallelism/layout.py",
    "parallelism/placement.py",
    "parallelism/shard.py",
    "cluster/admission.py",
    "cluster/routing.py",
)
IMPURE = {"torch", "ray", "asyncio", "time", "os", "random", "threading", "socket", "datetime"}
RAY = {"cluster/pick.py", "cluster/service.py", "workers/actor.py"}
FILES = sorted(file for room in ROOMS for file in (ROOT / room).rglob("*.py"))


def imports(file: Path) -> set[str]:
    """Modules that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            assert node.module is not None
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_one_way(file: Path) -> None:
    name = str(file.relative_to(ROOT))
    allowed = ROOMS[: ROOMS.index(file.relative_to(ROOT).parts[0]) + 1]
    tops = {module.split(".")[0] for module in imports(file)}
    assert tops & {*ROOMS, "moeray", "tests", "deploy"} <= {*allowed}, name
    if name not in RAY:
        assert "ray" not in tops, f"{name}: Ray belongs into {RAY}"
    if file.name == "__init__.py":
        assert not file.read_text(), f"{name} must stay empty"


@pytest.mark.parametrize("name", PURE)
def test_the_pure_ring_is_pure(name: str) -> None:
    """Neither a file of the ring nor anything of ours that it imports touches the world."""
    seen: set[str] = set()
    queue = [name]
    while queue:
        file = queue.pop()
        seen.add(file)
        for module in imports(ROOT / file):
            assert module.split(".")[0] not in IMPURE, f"{file} imports {module}"
            ours = module.replace(".", "/").rpartition("/")[0] + ".py"
            if (ROOT / ours).exists() and ours not in seen:
                queue.append(ours)
    assert seen <= {*PURE}, f"{name} reaches {seen - {*PURE}}"


def test_the_face_is_light() -> None:
    code = "import sys, moeray; print('torch' in sys.modules, 'ray' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "False"]


def test_the_top_level_is_what_was_agreed() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    top = {line.split("/")[0] for line in listed.stdout.splitlines()}
    assert {name for name in top if not name.startswith(".")} <= {
        *ROOMS,
        *("deploy", "tests", "docs", "pyproject.toml", "moeray.py", "Makefile"),
        *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE"),
    }


def test_the_map_shows_every_file() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    missing = [f.name for f in FILES if f.stat().st_size and f"`{f.name}`" not in text]
    assert not missing
