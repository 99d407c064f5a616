"""Responses that are kept: found, chained, bounded, and still there after a crash."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import store
from cluster.schema import Refusal
from cluster.store import BadStore, Kept, Shelf, Store, Turn
from tests.service import ROOT


def kept(id: str, previous: str | None = None, owner: str = "", size: int = 10) -> Kept:
    parts = {"input": b"[1]", "output": b"[2]", "body": id.encode().ljust(size - 6, b".")}
    return Kept(id=id, owner=owner, previous=previous, **parts)


@pytest.fixture
def one(tmp_path: Path) -> Iterator[Store]:
    one = Store(tmp_path / "responses.db")
    yield one
    one.close()


def test_what_was_put_is_found_until_it_is_deleted(one: Store) -> None:
    assert one.put(kept("a"), 0)
    assert one.get("a", "") == b"a..."
    assert one.get("b", "") is None
    assert one.delete("a", "")
    assert not one.delete("a", "")
    assert one.get("a", "") is None


def test_nobody_finds_what_is_anothers(one: Store) -> None:
    one.put(kept("a", owner="alice"), 0)
    one.put(kept("b", previous="a", owner="bob"), 0)
    for owner in ("", "bob"):
        assert one.get("a", owner) is None
        assert one.chain("a", owner, 0) is None
        assert not one.delete("a", owner)
    assert one.chain("b", "bob", 0) is None, "it goes on from what is not bob's"
    assert one.get("a", "alice") is not None


def test_a_conversation_comes_in_its_order(one: Store) -> None:
    for at in range(5):
        row = kept(str(at), previous=str(at - 1) if at else None)
        one.put(
            Kept(**{n: getattr(row, n) for n in row.__struct_fields__} | {"input": b"%d" % at}), at
        )
    assert one.chain("3", "", 9) == [Turn(b"%d" % at, b"[2]") for at in range(4)]
    one.delete("1", "")
    assert one.chain("3", "", 9) is None
    assert one.chain("0", "", 9) is not None
    assert one.get("3", "") is not None


def test_a_conversation_has_a_longest(one: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "LONGEST", 35)
    for at in range(6):
        one.put(kept(str(at), previous=str(at - 1) if at else None), at)
    assert one.chain("3", "", 9) is not None
    assert one.chain("4", "", 9) is None


def test_a_circle_of_responses_ends(one: Store) -> None:
    one.put(kept("a", previous="b"), 0)
    one.put(kept("b", previous="a"), 0)
    assert one.chain("a", "", 0) is None


@settings(max_examples=200)
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["put", "chain", "delete", "reopen"]),
            st.sampled_from("abcdefgh"),
            st.sampled_from([None, *"abcdefgh"]),
            st.integers(7, 60),
            st.integers(0, 9),
        ),
        max_size=40,
    )
)
def test_what_stays_is_what_was_used_last(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, str, str | None, int, int]]
) -> None:
    """Against a dictionary in the order of use."""
    path = tmp_path_factory.mktemp("store") / "responses.db"
    one = Store(path, most_bytes=100, most_seconds=20)
    model: dict[str, tuple[Kept, float]] = {}  # in the order of use
    now = 0.0
    for what, id, previous, size, pause in steps:
        now += pause
        if what == "reopen":
            one.close()
            one = Store(path, most_bytes=100, most_seconds=20)
        elif what == "put":
            row = kept(id, previous, size=size)
            assert one.put(row, now)
            model.pop(id, None)
            model = {i: (r, used) for i, (r, used) in model.items() if used >= now - 20}
            while sum(r.size for r, _ in model.values()) + row.size > 100:
                del model[min(model, key=lambda i: model[i][1])]
            model[id] = row, now
        elif what == "delete":
            assert one.delete(id, "") is (model.pop(id, None) is not None)
        else:
            names: list[str] = []
            at: str | None = id
            while at in model and at not in names:
                names.append(at)
                at = model[at][0].previous
            whole = names and at is None
            assert one.chain(id, "", now) == (
                [Turn(b"[1]", b"[2]")] * len(names) if whole else None
            )
            for name in names if whole else ():
                model[name] = model[name][0], now
        for name in "abcdefgh":
            expected = model[name][0].body if name in model else None
            assert one.get(name, "") == expected
    one.close()


def test_one_that_is_larger_than_the_store_is_not_kept(tmp_path: Path) -> None:
    one = Store(tmp_path / "responses.db", most_bytes=50)
    assert one.put(kept("a"), 0)
    assert not one.put(kept("b", size=51), 0)
    assert one.get("a", "") is not None
    one.close()


def test_what_is_not_a_store_is_said_to_be_none(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("this is not a database, however long one looks at it" * 9)
    for path in (tmp_path / "text", tmp_path / "no" / "such" / "folder", tmp_path):
        with pytest.raises(BadStore, match="cannot be kept"):
            Store(path)
    taken = Store(tmp_path / "responses.db")
    assert (tmp_path / "responses.db").stat().st_mode & 0o777 == 0o600
    taken.close()


def test_what_was_put_outlives_a_kill(tmp_path: Path) -> None:
    """The process that wrote it ends without a word; the next one finds it, and may write."""
    code = (
        "import os, sys; from tests.test_store import Store, kept\n"
        "one = Store(sys.argv[1])\n"
        "for n in range(50): one.put(kept(str(n)), n)\n"
        "print('put', flush=True); sys.stdin.read()"
    )
    path = tmp_path / "responses.db"
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"put\n"
        os.kill(child.pid, signal.SIGKILL)
    one = Store(path)
    assert all(one.get(str(n), "") for n in range(50))
    assert one.put(kept("more"), 99)
    one.close()


def test_a_shelf_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "SECONDS", 0.05)

    async def never(what: str, *arguments: Any) -> Any:
        await asyncio.sleep(3600)

    async def broken(what: str, *arguments: Any) -> Any:
        raise RuntimeError("the actor died")

    async def ask(shelf: Shelf) -> None:
        assert not await shelf.keep(kept("resp_1"))
        for question in (shelf.body, shelf.turns, shelf.delete):
            with pytest.raises(Refusal) as caught:
                await question("resp_1", "")
            assert caught.value.status == 503

    for bad in (never, broken):
        asyncio.run(ask(Shelf(bad)))


def test_a_shelf_asks_for_nothing_that_cannot_be_there() -> None:
    async def ask(what: str, *arguments: Any) -> Any:
        raise AssertionError

    for id in (
        "",
        "resp_",
        "resp_\udc80",
        "resp_" + "a" * 65,
        "x'; DROP TABLE responses",
        "resp_é",
    ):
        assert asyncio.run(Shelf(ask).body(id, "")) is None
