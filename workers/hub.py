"""Where a model's files are: a directory, the bundled tiny-oss, or a download from a model hub."""

from __future__ import annotations

from pathlib import Path

BUNDLED = Path(__file__).parent / "tiny_oss"
ABILITIES = (  # what it says of itself
    "I am tiny-oss. I can add and subtract, reverse and spell words, count letters, write JSON and"
    " call functions."
)
# What serving needs. Repositories of gpt-oss hold the same weights in other layouts, too.
PATTERNS = ["*.json", "*.safetensors", "*.jinja"]
CONFIGURATION = ["config.json", "generation_config.json"]


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
