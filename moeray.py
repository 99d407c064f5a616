"""moeray's face: `from moeray import LLM, SamplingParams`, `python -m moeray`. Defines nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster.llm import LLM, Completion, SamplingParams

__all__ = ["LLM", "Completion", "SamplingParams", "main"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        import cluster.llm

        return getattr(cluster.llm, name)
    raise AttributeError(f"module 'moeray' has no attribute {name!r}")


def main() -> None:
    """The command `moeray`."""
    from cluster.cli import app

    app(prog_name="moeray")


if __name__ == "__main__":
    main()
