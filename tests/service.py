"""`moeray serve` as a process of its own, started from a folder that means it harm."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil

from cluster.service import free_ports

ROOT = Path(__file__).parents[1]
START = 300.0  # seconds; ten are usual
DEADLINE = 180.0

T = TypeVar("T")


def hostile(folder: Path) -> Path:
    """A folder whose modules have the names of ours, and end any process that imports them."""
    (folder / "kernels").mkdir(parents=True)
    for file in ("cluster.py", "workers.py", "kernels/__init__.py"):
        (folder / file).write_text("import os\nos._exit(66)\n")
    return folder


def told(processes: list[psutil.Process], what: Callable[[psutil.Process], T]) -> list[T]:
    """What is asked of each; Ray ends those it does not need at any time."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            found.append(what(process))
    return found


def folders(processes: list[psutil.Process]) -> list[Path]:
    """Where they run."""
    return [Path(cwd) for cwd in told(processes, psutil.Process.cwd)]


class Service:
    def __init__(self, folder: Path, *flags: str, **environment: str) -> None:
        self.port = free_ports(1)[0]
        self._joined = "--address" in flags  # the cluster's Serve keeps the port
        self.url = f"http://127.0.0.1:{self.port}"
        self._log, self._out = folder / "stderr", folder / "stdout"
        command = [sys.executable, str(ROOT / "moeray.py"), "serve", "--port", str(self.port)]
        with self._log.open("w") as log, self._out.open("w") as out:
            self.process = subprocess.Popen(
                [*command, *flags],
                cwd=hostile(folder / "cwd"),
                stdout=out,
                stderr=log,
                env=os.environ | environment,
            )

    def said(self) -> str:
        return self._log.read_text() + self._out.read_text()

    def wait_until_ready(self) -> None:
        """Until it says so."""
        end = time.monotonic() + START
        while f"ready at {self.url}" not in self._out.read_text():
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < end, self.said()
            time.sleep(0.1)

    def family(self) -> list[psutil.Process]:
        """Its processes that live: who was orphaned and has ended waits for the service's end."""
        found = psutil.Process(self.process.pid).children(recursive=True)
        states = told(found, lambda process: (process, process.status()))
        return [process for process, state in states if state != psutil.STATUS_ZOMBIE]

    def stop(self, number: int = signal.SIGTERM) -> int:
        """The exit status. Fails where a process, a port or a folder is left."""
        if self.process.poll() is not None:
            return self.process.returncode
        family = self.family()
        homes = {cwd.parent for cwd in folders(family) if "moeray-" in str(cwd)}
        self.process.send_signal(number)
        try:
            status = self.process.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        left = [process for process in family if process.is_running()]
        assert not left, f"left over: {left}"
        assert not [home for home in homes if home.exists()]
        if self._joined:
            return status
        with socket.create_server(("127.0.0.1", self.port)):
            return status

    # What it says of itself.

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = httpx.get(f"{self.url}/status", timeout=DEADLINE).json()
        return found

    def ranks(self) -> list[int]:
        """Process ids, by rank."""
        return [rank["pid"] for engine in self.status()["engines"] for rank in engine["ranks"]]

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have ``labels``."""
        total = 0.0
        for line in httpx.get(f"{self.url}/metrics", timeout=DEADLINE).text.splitlines():
            key, _, value = line.rpartition(" ")
            if key.split("{")[0] == name and all(f'{k}="{v}"' in key for k, v in labels.items()):
                total += float(value)
        return total

    def until(self, ready: Callable[[], bool], patience: float = DEADLINE) -> None:
        """Poll, with a deadline."""
        end = time.monotonic() + patience
        while not ready():
            assert time.monotonic() < end, self.said()
            time.sleep(0.02)
