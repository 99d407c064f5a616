"""`moeray serve` as a process of its own, started from a folder that means it harm."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil

ROOT = Path(__file__).parents[1]
START = 120.0  # seconds; ten are usual
DEADLINE = 60.0


def hostile(folder: Path) -> Path:
    """A folder whose modules have the names of ours, and end any process that imports them."""
    (folder / "kernels").mkdir(parents=True)
    for file in ("cluster.py", "workers.py", "kernels/__init__.py"):
        (folder / file).write_text("import os\nos._exit(66)\n")
    return folder


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


class Service:
    def __init__(self, folder: Path, *flags: str, **environment: str) -> None:
        self.port = free_port()
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
        return [process for process in found if process.status() != psutil.STATUS_ZOMBIE]

    def stop(self, number: int = signal.SIGTERM) -> int:
        """The exit status. Fails where a process, a port or a folder is left."""
        if self.process.poll() is not None:
            return self.process.returncode
        family = self.family()
        homes = {Path(child.cwd()).parent for child in family if "moeray-" in child.cwd()}
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
