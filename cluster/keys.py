"""API keys: who may ask. Only hashes are kept, here and everywhere else.

A file of keys is TOML, one table for each::

    [[key]]
    name = "alice"
    sha256 = "..."               # printf %s "$KEY" | sha256sum
    max_concurrent_requests = 8  # optional
    requests_per_minute = 600    # optional
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import tomllib
from collections.abc import Sequence
from pathlib import Path

import msgspec

from cluster.schema import Refusal
from workers.config import ApiKey

LOOK = 1.0  # seconds between two looks at the file

log = logging.getLogger(__name__)


class BadKeys(ValueError):
    """The file of keys cannot be used; the message is a sentence without any of its values."""


class _File(msgspec.Struct, forbid_unknown_fields=True):
    key: list[ApiKey] = []


def sha256(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def given(secret: str) -> ApiKey:
    """A key that was given without a name, named by its hash: what is stored under a name must not
    change hands when keys come, go or change places."""
    digest = sha256(secret)
    return ApiKey(name=f"key-{digest[:12]}", sha256=digest)


def read(path: str | Path, others: Sequence[ApiKey] = ()) -> tuple[ApiKey, ...]:
    """The keys in a file after the ``others``, whose names it may not have. Raises BadKeys."""
    try:
        with Path(path).open("rb") as file:
            keys = (*others, *msgspec.convert(tomllib.load(file), _File).key)
    except OSError as error:
        raise BadKeys(f"{path} cannot be read: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise BadKeys(f"{path} is not TOML: {error}") from None
    except (msgspec.ValidationError, UnicodeDecodeError) as error:
        raise BadKeys(f"{path}: {error}") from None
    if len({key.name for key in keys}) < len(keys):
        raise BadKeys(f"{path} names two keys alike, or one like a key from elsewhere")
    if len({key.sha256 for key in keys}) < len(keys):
        raise BadKeys(f"{path} has a key twice, or one that was given elsewhere, too")
    return keys


class Keys:
    """The keys of a service: some given, others in a file that is read again when it changes.

    A file that cannot be read changes nothing: the keys that were known stay.
    """

    def __init__(self, given: Sequence[ApiKey] = (), file: str = "") -> None:
        self._given, self._file = tuple(given), file
        self._keys = self._given
        self._seen: tuple[int, int, int] | None = None  # the file's, when it was read
        self._looked = float("-inf")

    def allow(self, authorization: str | None, now: float) -> ApiKey | None:
        """Whose key the header holds; None where no key is needed. Raises Refusal."""
        self._look(now)
        if not self._given and not self._file:
            return None
        scheme, _, secret = (authorization or "").partition(" ")
        digest = sha256(secret.strip() if scheme.lower() == "bearer" else "").encode()
        # All of them are compared, so that the time does not tell which came close.
        found = [key for key in self._keys if hmac.compare_digest(digest, key.sha256.encode())]
        if not found:
            raise Refusal(
                "this API key is not known"
                if authorization
                else "an API key is needed: send the header Authorization: Bearer KEY",
                status=401,
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        return found[0]

    def _look(self, now: float) -> None:
        if not self._file or now - self._looked < LOOK:
            return
        self._looked = now
        try:
            state = Path(self._file).stat()
            seen = (state.st_mtime_ns, state.st_size, state.st_ino)
            if seen != self._seen:
                self._seen = seen
                self._keys = read(self._file, self._given)
        except OSError as error:
            log.error("%s cannot be read: %s; its keys stay as they were", self._file, error)
        except BadKeys as error:
            log.error("%s; the keys stay as they were", error)
