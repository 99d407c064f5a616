"""``python -m tests.mutate``: every mutant of ``tests.mutants`` must be caught by its test.

All happens in one copy of the code. A mutant that does not apply any more, or survives, fails.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from queue import SimpleQueue

from tests.mutants import MUTANTS, Mutant

ROOT = Path(__file__).parents[1]
COPIED = ("cluster", "workers", "kernels", "parallelism", "deploy", "tests")
WORKERS = 2  # copies that run at once
INTERPRETER = "tests/interpreter/"  # its tests need a process of their own


def copy(to: Path) -> Path:
    for name in COPIED:
        shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("moeray.py", "pyproject.toml"):
        shutil.copy(ROOT / name, to)
    return to


def _interpreted(test: str) -> bool:
    return test.startswith(INTERPRETER)


def run(tests: list[str], where: Path) -> tuple[int, str]:
    """pytest's exit code and output, in a copy."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests],
        cwd=where,
        env=os.environ
        | {"PYTHONPATH": str(where), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        | {"TRITON_INTERPRET": str(int(_interpreted(tests[0])))},
        capture_output=True,
        text=True,
        timeout=1800,  # pytest ends a test that hangs sooner
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def verdict(mutant: Mutant, where: Path) -> str:
    """Empty if the mutant was caught, else what is wrong."""
    file = where / mutant.file
    original = file.read_text()
    if original.count(mutant.text) != 1:
        return f"its text occurs {original.count(mutant.text)} times"
    file.write_text(original.replace(mutant.text, mutant.replacement))
    try:
        code, output = run([mutant.test], where)
    except subprocess.TimeoutExpired:
        return "its test does not end"
    finally:
        file.write_text(original)
    if code == 1 and re.search(r"^FAILED ", output, re.MULTILINE):
        return ""
    return "it survives" if code == 0 else f"pytest ended with {code}:\n{output[-2000:]}"


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="moeray-mutants-") as folder:
        copies = [copy(Path(folder) / str(at)) for at in range(WORKERS)]
        tests = sorted({mutant.test for mutant in MUTANTS}, key=_interpreted)
        for _, together in groupby(tests, _interpreted):
            code, output = run([*together], copies[0])
            if code:
                print(f"without mutants the tests fail already:\n{output[-4000:]}")
                return 1
        began = time.monotonic()

        idle: SimpleQueue[Path] = SimpleQueue()
        for each in copies:
            idle.put(each)

        def judge(mutant: Mutant) -> tuple[Mutant, str]:
            where = idle.get_nowait()  # there are as many as threads
            try:
                return mutant, verdict(mutant, where)
            finally:
                idle.put(where)

        with ThreadPoolExecutor(WORKERS) as pool:
            results = [*pool.map(judge, MUTANTS)]
    wrong = [(mutant, problem) for mutant, problem in results if problem]
    for mutant, problem in wrong:
        print(f"{mutant.file}: {mutant.why}\n  {mutant.text!r}\n  {mutant.test}: {problem}")
    caught = len(results) - len(wrong)
    print(f"{caught} of {len(results)} mutants caught in {time.monotonic() - began:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
