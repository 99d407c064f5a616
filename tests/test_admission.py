"""Who may come in, and when to come again: the policy alone, without a clock."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster import cli, keys
from cluster.admission import LONGEST, Admission, Full, Rate, Ticket
from cluster.keys import BadKeys, Keys
from cluster.schema import Refusal
from workers.config import ApiKey, Limits


def key(name: str, secret: str = "", **limits: Any) -> ApiKey:
    return ApiKey(name=name, sha256=hashlib.sha256(secret.encode()).hexdigest(), **limits)


def enter(admission: Admission, now: float, requests: int = 1, tokens: int = 0) -> Ticket:
    """Come in and be understood at once."""
    ticket = admission.enter(None, now)
    admission.weigh(ticket, requests, tokens, now)
    return ticket


def test_concurrent_requests_are_those_that_live() -> None:
    admission = Admission(Limits(max_concurrent_requests=2))
    first, _ = admission.enter(None, 0.0), admission.enter(None, 0.0)
    with pytest.raises(Full, match="2 requests"):
        admission.enter(None, 1.0)
    admission.leave(first, 1.0)
    admission.leave(first, 1.0)  # told twice: nothing drifts
    admission.enter(None, 1.0)
    with pytest.raises(Full):
        admission.enter(None, 1.0)
    assert len(admission) == 2


def test_the_queue_holds_what_has_no_token_yet() -> None:
    admission = Admission(Limits(max_num_queued_reqs=3, max_num_queued_tokens=100))
    big = admission.enter(None, 0.0)
    admission.weigh(big, 1, 5000, 0.0)  # alone: it may wait, or it would never run
    with pytest.raises(Full, match="5,000 prompt tokens wait, 100 may") as caught:
        admission.enter(None, 0.0)
    assert caught.value.kind == "tokens"
    admission.start(big, 2.0)
    several = admission.enter(None, 2.0)
    admission.weigh(several, 3, 30, 2.0)
    with pytest.raises(Full, match="3 sequences wait, 3 may") as caught:
        admission.enter(None, 2.0)
    assert caught.value.kind == "requests"
    admission.start(several, 3.0)
    small = admission.enter(None, 3.0)
    admission.weigh(small, 1, 60, 3.0)
    late = admission.enter(None, 3.0)
    with pytest.raises(Full, match="60 prompt tokens wait"):
        admission.weigh(late, 1, 41, 3.0)
    assert len(admission) == 3, "it is gone, and its place with it"
    admission.leave(late, 3.0)
    admission.weigh(admission.enter(None, 3.0), 1, 40, 3.0)


def test_refusals_do_not_look_like_progress() -> None:
    """Who is turned away has freed no place for those who come again."""
    admission = Admission(Limits(max_concurrent_requests=2, max_num_queued_reqs=1))
    first = enter(admission, 0.0)
    admission.start(first, 0.0)
    enter(admission, 0.0)
    for now in range(1, 50):
        with pytest.raises(Full) as caught:
            admission.enter(None, float(now))
        assert caught.value.seconds == 5, "nothing has left yet"
    admission.leave(first, 50.0)
    with pytest.raises(Full):  # the queue is full still
        admission.enter(None, 50.0)


def test_when_to_come_again_follows_from_what_has_left() -> None:
    rate = Rate()
    assert rate.seconds(1) == 5, "nobody knows"
    for _ in range(10):
        rate.spend(1)
        rate.note(20)
    assert rate.seconds(19) == 1
    assert 9 <= rate.seconds(200) <= 10
    assert rate.seconds(10**9) == LONGEST
    rate.spend(10)
    assert 19 <= rate.seconds(200) <= 22, "slower, as nothing left since"


@given(
    st.lists(st.tuples(st.floats(0, 50), st.integers(1, 1000))),
    st.integers(1, 10**9),
    st.floats(0, 200_000),
)
def test_it_is_always_a_sane_number(
    left: list[tuple[float, int]], amount: int, later: float
) -> None:
    rate = Rate()
    for wait, size in left:
        rate.spend(wait)
        rate.note(size)
    rate.spend(later)
    seconds = rate.seconds(amount)
    assert 1 <= seconds <= LONGEST
    assert seconds <= rate.seconds(amount * 2)


def test_an_idle_service_is_no_slow_one() -> None:
    admission = Admission(Limits(max_num_queued_reqs=2))
    one = enter(admission, 0.0)
    admission.start(one, 0.2)
    admission.leave(one, 0.2)
    for _ in range(2):
        enter(admission, 50.0)
    with pytest.raises(Full) as caught:
        admission.enter(None, 50.0)
    assert caught.value.seconds == 1


@given(
    st.lists(st.tuples(*[st.integers(0, 400)] * 3, st.integers(1, 9)), max_size=20),
    st.integers(0, 4000),
)
def test_only_busy_time_counts(stretches: list[tuple[int, int, int, int]], waited: int) -> None:
    """However long nothing was there between requests, those who come too late are told the same.

    Times are in eighths of a second, so that their differences are exact.
    """

    def told(limits: Limits, idle: bool) -> int:
        admission, now = Admission(limits), 0.0
        for pause, queued, running, requests in stretches:
            now += pause / 8 if idle else 0
            ticket = enter(admission, now, requests, requests)
            admission.start(ticket, now := now + queued / 8)
            admission.leave(ticket, now := now + running / 8)
        now += 1000.0 if idle else 0
        enter(admission, now, tokens=9)
        with pytest.raises(Full) as caught:
            admission.enter(None, now + waited / 8)
        return caught.value.seconds

    for limits in (
        Limits(max_concurrent_requests=1),
        Limits(max_num_queued_reqs=1),
        Limits(max_num_queued_tokens=3),
    ):
        assert told(limits, idle=True) == told(limits, idle=False)


def test_who_is_slow_to_ask_keeps_nobody_from_the_queue() -> None:
    """Nor does one who never wants a token, as for /tokenize."""
    admission = Admission(Limits(max_num_queued_reqs=2))
    for _ in range(8):
        admission.enter(None, 0.0)
    for _ in range(2):
        enter(admission, 1.0)
    with pytest.raises(Full, match="2 sequences wait"):
        admission.enter(None, 1.0)


@given(st.lists(st.tuples(st.sampled_from(["enter", "start", "leave"]), st.integers(0, 9))))
def test_nothing_leaks(moves: list[tuple[str, int]]) -> None:
    """Whatever happens, the limits are those of what lives; in the end nothing does."""
    admission = Admission(Limits(max_concurrent_requests=4, max_num_queued_reqs=2))
    live: list[Ticket] = []
    for now, (move, which) in enumerate(moves):
        waiting = sum(ticket.waiting for ticket in live)
        if move == "enter":
            fits = len(live) < 4 and waiting < 2
            try:
                live.append(enter(admission, now))
                assert fits
            except Full:
                assert not fits
        elif live:
            ticket = live[which % len(live)]
            if move == "start":
                admission.start(ticket, now)
            else:
                live.remove(ticket)
                admission.leave(ticket, now)
        assert len(admission) == len(live)


def test_a_key_has_limits_of_its_own() -> None:
    admission = Admission(Limits())
    few, slow = key("few", max_concurrent_requests=1), key("slow", requests_per_minute=2)
    ticket = admission.enter(few, 0.0)
    with pytest.raises(Full, match="'few' has 1 requests running; 1 are allowed"):
        admission.enter(few, 0.0)
    admission.enter(slow, 0.0)
    admission.leave(ticket, 1.0)
    admission.enter(few, 1.0)
    admission.enter(slow, 20.0)
    with pytest.raises(Full, match="2 requests a minute") as caught:
        admission.enter(slow, 30.0)
    assert caught.value.seconds == 30
    admission.enter(slow, 60.0)
    with pytest.raises(Full) as caught:
        admission.enter(slow, 60.0)
    assert caught.value.seconds == 20


# ---- Keys


def refused(known: Keys, header: str | None, now: float = 0.0) -> None:
    with pytest.raises(Refusal) as caught:
        known.allow(header, now)
    assert caught.value.status == 401
    assert caught.value.headers == {"www-authenticate": "Bearer"}
    assert b"sesame" not in caught.value.body


def test_only_a_known_key_opens() -> None:
    assert Keys().allow(None, 0.0) is None
    known = Keys([key("a", "sesame"), key("b", "other")])
    for secret, name in (("sesame", "a"), ("other", "b")):
        found = known.allow(f"Bearer {secret}", 0.0)
        assert found is not None
        assert found.name == name
    assert known.allow("bearer  sesame ", 0.0) is not None
    for header in (None, "", "sesame", "Bearer", "Bearer ", "Bearer sesam", "Basic sesame", "\xff"):
        refused(known, header)
    refused(Keys([key("empty", "")][:0], file="/nowhere"), "Bearer ")


def test_a_key_without_a_name_has_its_own_wherever_it_stands(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What it owns must not pass to another key with its place in a list."""
    assert keys.given("sesame").name == "key-" + keys.sha256("sesame")[:12]
    assert msgspec.convert(msgspec.to_builtins(keys.given("a")), ApiKey) == keys.given("a")
    found = []
    for secrets in ("alice,bob", "bob, alice,,bob"):
        monkeypatch.setenv(cli.API_KEY, secrets)
        found.append({key.sha256: key.name for key in cli._api_keys()})
        assert cli.API_KEY not in os.environ
    assert found[0] == found[1]
    assert len({*found[0].values()}) == 2


def test_two_sources_may_not_give_one_name_or_one_key_twice(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "keys.toml"
    own = keys.given("open")
    for text in (table(own.name, "sesame"), table("alice", "open")):
        file.write_text(text)
        with pytest.raises(BadKeys, match="elsewhere"):
            keys.read(file, [own])
        known = Keys([own], str(file))
        with caplog.at_level(logging.ERROR):
            refused(known, "Bearer sesame")
        found = known.allow("Bearer open", 0.0)
        assert found == own
    assert "stay as they were" in caplog.text


def table(name: str, secret: str, more: str = "") -> str:
    return f'[[key]]\nname = "{name}"\nsha256 = "{keys.sha256(secret)}"\n{more}\n'


def test_a_file_is_read_again_when_it_changes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(table("alice", "sesame", "requests_per_minute = 3"))
    known = Keys([key("given", "first")], str(file))
    found = known.allow("Bearer sesame", 0.0)
    assert found is not None
    assert (found.name, found.requests_per_minute) == ("alice", 3)
    file.write_text(table("bob", "open"))
    os.utime(file, (1, 1))
    assert known.allow("Bearer sesame", 0.5) is not None, "not looked at yet"
    refused(known, "Bearer sesame", 2.0)
    assert known.allow("Bearer open", 2.0) is not None
    assert known.allow("Bearer first", 2.0) is not None
    with caplog.at_level(logging.ERROR):
        file.write_text("sesame = [")
        assert known.allow("Bearer open", 4.0) is not None, "a mistake locks nobody out"
        file.unlink()
        assert known.allow("Bearer open", 6.0) is not None
    assert "stay as they were" in caplog.text
    assert "sesame" not in caplog.text
    file.write_text("")
    refused(known, "Bearer open", 8.0)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[[key]]", "name"),
        ("key = 1", "array"),
        (table("a b", "x"), "name"),
        ('[[key]]\nname = "a"\nsha256 = "sesame"', "sha256"),
        (table("a", "x", "color = 1"), "color"),
        (table("a", "x", "requests_per_minute = 0"), "requests_per_minute"),
        (table("a", "x") + table("a", "y"), "alike"),
        (table("a", "x") + table("b", "x"), "twice"),
        ("[[", "TOML"),
    ],
)
def test_a_wrong_file_says_what_is_wrong(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(text)
    with pytest.raises(BadKeys, match=says) as caught:
        keys.read(file)
    assert "sesame" not in str(caught.value)
    with pytest.raises(BadKeys, match="cannot be read"):
        keys.read(tmp_path / "none")
