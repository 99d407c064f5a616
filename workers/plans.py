"""The plan channel: rank 0 tells the other ranks what to run, step by step.

A CPU channel of its own, never the tensor group, so that a rank that hangs in a collective and one
that waits for work can be told apart. Plans are numbered; every wait has a deadline. While there is
nothing to do rank 0 sends a heartbeat, so a follower notices when it is gone.
"""

from __future__ import annotations

import contextlib
import hmac
import secrets
import socket
import time

import msgspec

from workers.wire import Batch

BEAT = 1.0  # seconds between heartbeats of an idle engine
DEADLINE = 60.0  # seconds a rank waits for another before it gives up
HANDSHAKE = 5.0  # seconds a connection has to say who it is
MAX_PLAN = 64 << 20  # bytes


class PlanLost(ConnectionError):
    """A rank is gone, silent or out of step; the group must be rebuilt."""


def _read(sock: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        try:
            part = sock.recv(size - len(data))
        except TimeoutError:
            raise PlanLost(f"rank 0 has been silent for {sock.gettimeout():.0f} s") from None
        except OSError as error:
            raise PlanLost(f"rank 0 is gone: {error}") from error
        if not part:
            raise PlanLost("rank 0 has closed the plan channel")
        data += part
    return bytes(data)


class Leader:
    """Rank 0's end."""

    def __init__(self, host: str, key: bytes) -> None:
        self._listener = socket.create_server((host, 0))
        self._key = key
        self._followers: dict[int, socket.socket] = {}
        self._encode = msgspec.msgpack.Encoder().encode

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    def accept(self, followers: int, timeout: float = DEADLINE) -> None:
        """Wait until ranks 1..followers have connected and proved that they know the key."""
        end = time.monotonic() + timeout
        while len(self._followers) < followers:
            self._listener.settimeout(max(0.01, end - time.monotonic()))
            try:
                sock, _ = self._listener.accept()
            except TimeoutError:
                missing = set(range(1, followers + 1)) - self._followers.keys()
                raise PlanLost(
                    f"ranks {sorted(missing)} have not come in {timeout:.0f} s"
                ) from None
            sock.settimeout(HANDSHAKE)
            nonce = secrets.token_bytes(32)
            try:
                sock.sendall(nonce)
                rank = int.from_bytes(_read(sock, 4), "little")
                digest = _read(sock, 32)
            except (PlanLost, OSError):
                sock.close()
                continue
            expected = hmac.digest(self._key, nonce + rank.to_bytes(4, "little"), "sha256")
            if not hmac.compare_digest(digest, expected):
                sock.close()
                continue
            sock.settimeout(DEADLINE)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._followers[rank] = sock

    def send(self, batch: Batch | None) -> None:
        """Tell every follower to run ``batch``; None is a heartbeat. Raises PlanLost."""
        body = self._encode(batch) if batch is not None else b""
        frame = len(body).to_bytes(4, "little") + body
        for rank, sock in self._followers.items():
            try:
                sock.sendall(frame)
            except OSError as error:
                raise PlanLost(f"rank {rank} does not take plans: {error}") from error

    def close(self) -> None:
        self._listener.close()
        for sock in self._followers.values():
            sock.close()


class Follower:
    """The end of ranks 1 and up."""

    def __init__(self, host: str, port: int, rank: int, key: bytes) -> None:
        try:
            self._sock = socket.create_connection((host, port), DEADLINE)
        except OSError as error:
            raise PlanLost(f"rank {rank} cannot reach rank 0 at {host}:{port}: {error}") from error
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        name = rank.to_bytes(4, "little")
        nonce = _read(self._sock, 32)
        self._sock.sendall(name + hmac.digest(key, nonce + name, "sha256"))
        self._decode = msgspec.msgpack.Decoder(Batch).decode
        self._step = 0

    def receive(self) -> Batch | None:
        """The next plan, or None for a heartbeat. Raises PlanLost."""
        size = int.from_bytes(_read(self._sock, 4), "little")
        if not size:
            return None
        if size > MAX_PLAN:
            raise PlanLost(f"a plan of {size} bytes exceeds {MAX_PLAN}")
        batch = self._decode(_read(self._sock, size))
        if batch.step:
            if batch.step != self._step + 1:
                raise PlanLost(f"step {batch.step} came after step {self._step}")
            self._step = batch.step
        return batch

    def interrupt(self) -> None:
        """Let ``receive`` end; from any thread."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._sock.close()
