"""Files of experts: the load that services recorded, and the placement that they serve by."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from parallelism.placement import ExpertLoad, Placement, PlacementError, parse
from workers.architecture import Architecture
from workers.config import ModelSpec


def placement(spec: ModelSpec, architecture: Architecture) -> Placement | None:
    """Of ``spec.expert_placement``, for the model in the directory ``spec.model``; None: there is
    none. Raises PlacementError."""
    if not spec.expert_placement:
        return None
    ranks = spec.data_parallel_size * spec.tensor_parallel_size
    try:
        if ranks == 1:
            raise PlacementError(
                "one rank holds all experts; a placement needs more: give --tensor-parallel-size"
            )
        if not spec.enable_expert_parallel:
            raise PlacementError("it places whole experts: add --enable-expert-parallel")
        found = parse(Placement, Path(spec.expert_placement).read_bytes())
        shape = architecture.num_layers, architecture.num_experts
        found.check(_config(Path(spec.model)), *shape, ranks)
    except (OSError, PlacementError) as error:
        raise PlacementError(f"--expert-placement {spec.expert_placement}: {error}") from error
    return found


def nothing(
    directory: Path, model: str, layers: int, experts: int, expert_bytes: int = 0
) -> ExpertLoad:
    """Of a checkpoint that has served no token yet; its ``model`` is a name for people."""
    return ExpertLoad(
        model=model,
        config=_config(directory),
        expert_bytes=expert_bytes,
        calls=((0,) * experts,) * layers,
    )


def numbered(file: str, engine: int) -> str:
    """Every engine's own file: load.json, load.1.json, load.2.json."""
    path = Path(file)
    return str(path.with_suffix(f".{engine}{path.suffix}")) if file and engine else file


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


def _config(directory: Path) -> str:
    """What tells models apart: the SHA-256 of config.json."""
    return hashlib.sha256((directory / "config.json").read_bytes()).hexdigest()
