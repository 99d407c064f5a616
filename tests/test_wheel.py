"""The built wheel works from another folder, and holds what it should."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("cluster", "workers", "kernels", "parallelism")


def test_the_wheel_serves_from_another_folder(tmp_path: Path) -> None:
    source, built, installed = (tmp_path / name for name in ("source", "built", "installed"))
    source.mkdir()
    for name in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("moeray.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", built, source],
        check=True,
        timeout=500,
    )
    (wheel,) = built.glob("moeray-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(installed)
    tops = {name.split("/")[0] for name in names}
    assert tops - {next(top for top in tops if top.endswith(".dist-info"))} == {
        *PACKAGES,
        "moeray.py",
    }
    assert "workers/tiny_oss/model.safetensors" in names
    done = subprocess.run(
        [sys.executable, "-m", "moeray", "generate", "--prompt", "What is 17 + 25?"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stdout == "42\n", done.stderr
