"""The one way from host code to a Triton kernel, so that a launch can also be looked at.

``moeray compile`` and the dry run watch what a model launches, on fake tensors and without a GPU,
and hand each launch to the compiler instead of to a device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from kernels.configurations import Tile


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel with all that Triton specialises it on."""

    kernel: Any  # triton.JITFunction
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]  # constexprs, num_warps, num_stages
    tile: Tile | None  # the configuration of a kernel with products


_watcher: Callable[[Launch], None] | None = None


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, tile: Tile | None = None, **options: Any
) -> None:
    """``kernel[grid](*arguments, **options)``, unless somebody watches. A ``tile`` brings its
    warps and stages along."""
    if tile is not None:
        options |= {"num_warps": tile.warps, "num_stages": tile.stages}
    if _watcher is None:
        kernel[grid](*arguments, **options)
    else:
        _watcher(Launch(kernel, grid, arguments, options, tile))


@contextmanager
def watched(watcher: Callable[[Launch], None]) -> Iterator[None]:
    """Within it, launches go to ``watcher`` and nowhere else."""
    global _watcher
    assert _watcher is None, "watched twice"
    _watcher = watcher
    try:
        yield
    finally:
        _watcher = None
