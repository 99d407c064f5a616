"""Benchmarks: each compares things in one run. Lines of Markdown are made here."""

from __future__ import annotations

from collections.abc import Iterable


def row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def table(head: list[str], rows: Iterable[str]) -> list[str]:
    return [row(*head), row(*["---"] * len(head)), *rows, ""]
