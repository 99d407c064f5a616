"""The file of ``--expert-load``: tokens that every expert got, in all services that wrote it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from parallelism.placement import ExpertLoad, PlacementError, parse


def nothing(
    directory: Path, model: str, layers: int, experts: int, expert_bytes: int = 0
) -> ExpertLoad:
    """Of a checkpoint that has served no token yet; its ``model`` is a name for people."""
    return ExpertLoad(
        model=model,
        config=hashlib.sha256((directory / "config.json").read_bytes()).hexdigest(),
        expert_bytes=expert_bytes,
        calls=((0,) * experts,) * layers,
    )


def numbered(file: str, replica: int) -> str:
    """Every replica's own file: load.json, load.1.json, load.2.json."""
    path = Path(file)
    return str(path.with_suffix(f".{replica}{path.suffix}")) if file and replica else file


class Recording:
    """Writes what is counted since ``nothing``, together with what the file held before.

    Raises ValueError for a file that is not this model's, or cannot be read or written.
    """

    def __init__(self, file: str, nothing: ExpertLoad) -> None:
        self._file, self._nothing, self._before = Path(file), nothing, nothing
        try:
            if self._file.exists():
                self._before = nothing.plus(parse(ExpertLoad, self._file.read_bytes()))
            self.write(nothing.calls)
        except (OSError, PlacementError) as error:
            raise ValueError(f"--expert-load {file}: {error}") from error

    def write(self, calls: Sequence[Sequence[int]]) -> None:
        """The file is whole at any time. Raises OSError."""
        since = msgspec.structs.replace(self._nothing, calls=tuple(map(tuple, calls)))
        beside = self._file.with_name(f"{self._file.name}.{os.getpid()}")
        beside.write_bytes(msgspec.json.encode(self._before.plus(since)))
        beside.replace(self._file)
