"""Where a model's files are: a directory, the bundled tiny-oss, or a download from a model hub; and
what those say that hold no weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workers.architecture import Architecture, parse

BUNDLED = Path(__file__).parent / "tiny_oss"
ABILITIES = (  # what it says of itself
    "I am tiny-oss. I can add and subtract, reverse and spell words, count letters, write JSON and"
    " call functions."
)
# What serving needs. Repositories of gpt-oss hold the same weights in other layouts, too.
PATTERNS = ["*.json", "*.safetensors", "*.jinja"]
CONFIGURATION = ["config.json", "generation_config.json"]


class CheckpointError(ValueError):
    """A checkpoint that cannot be served; the message names the tensor and the file."""


class NoModel(ValueError):
    """There is no such model; the message says what to give instead."""


def resolve(model: str, revision: str = "main", weights: bool = True) -> Path:
    """The directory of ``model``: a directory, a hub id, or nothing for the bundled model.

    A hub id is downloaded, with progress bars, into Hugging Face's cache, on request without its
    weights. Raises NoModel.
    """
    if not model:
        return BUNDLED
    directory = Path(model).expanduser()
    if directory.is_dir():
        if not (directory / "config.json").is_file():
            raise NoModel(f"{model} holds no config.json: give a directory in Hugging Face layout")
        return directory.resolve()
    if model.startswith(("/", ".", "~")) or model.count("/") != 1 or directory.exists():
        raise NoModel(f"{model} is neither a directory nor a hub id such as openai/gpt-oss-20b")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                model,
                revision=revision,
                allow_patterns=PATTERNS if weights else CONFIGURATION,
                ignore_patterns=["original/*", "metal/*"],
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).strip().splitlines() or [type(error).__name__]
        raise NoModel(f"{model} could not be downloaded: {first[0]}") from error


def read_json(file: Path) -> Mapping[str, Any]:
    """A JSON object. Raises CheckpointError."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} holds no JSON object")
    return found


def architecture(directory: Path) -> Architecture:
    """Of a checkpoint. Raises CheckpointError, UnsupportedModel."""
    generation = directory / "generation_config.json"
    return parse(
        read_json(directory / "config.json"),
        read_json(generation) if generation.exists() else None,
    )
