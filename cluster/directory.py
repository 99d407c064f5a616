"""Which engines run, as this process hears it from Serve; and a call to a chosen one.

Serve tells its request router about replicas, so the router keeps the list. It is pickled by value:
``cluster/pick.py`` is the shim that calls what is here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

Replicas = Mapping[str, Mapping[str, Any]]  # replica id -> what it says of itself

_lock = threading.Lock()
_replicas: Replicas = {}
_watchers: list[Callable[[Replicas], None]] = []


def update(replicas: Replicas) -> None:
    """The router's list has changed. Called from any thread."""
    global _replicas
    with _lock:
        _replicas = replicas
        watchers = [*_watchers]
    for watcher in watchers:
        watcher(replicas)


def watch(watcher: Callable[[Replicas], None]) -> None:
    """Call ``watcher`` with the list now and at every change, from any thread."""
    with _lock:
        _watchers.append(watcher)
        replicas = _replicas
    watcher(replicas)


def unwatch(watcher: Callable[[Replicas], None]) -> None:
    with _lock:
        _watchers.remove(watcher)
