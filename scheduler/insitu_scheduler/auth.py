"""Who a caller is: API keys, and what they allow."""

from __future__ import annotations

import datetime
import hmac
import logging
import time
from contextvars import ContextVar
from typing import TYPE_CHECKING, Protocol

from insitu_scheduler.keys import Key, digest_of, read_keys
from insitu_wire.errors import Error, Reason, error
from insitu_wire.limits import API_KEY_METADATA

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from insitu_scheduler.bad_attempts import BadAttempts

_log = logging.getLogger(__name__)

_LOOK_SECONDS = 1.0
_CALLER: ContextVar[Key] = ContextVar("insitu_caller")


def caller() -> Key:
    """Gives the key of the call that is being answered."""
    return _CALLER.get()


class Keys(Protocol):
    """Tells whose a key is."""

    def find(self, digest: bytes) -> Key | None:
        """Gives the key of a digest; None if it is nobody's."""
        ...


class KeyFile:
    """The keys of a file, read again whenever it changes."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """Reads the file.

        Args:
            path: the file.
            clock: tells when to look whether it has changed: at most once a second.

        Raises:
            ConfigurationError: it can not be used.
        """
        self._path = path
        self._clock = clock
        self._looked_at = clock()
        self._version = _version(path)
        self._keys = _by_digest(read_keys(path))

    def find(self, digest: bytes) -> Key | None:
        """Gives the key of a digest, in a time that tells nothing of the keys that there are."""
        self._look()
        found = self._keys.get(digest[:8])
        if found is None or not hmac.compare_digest(found.digest, digest):
            return None
        return found

    def _look(self) -> None:
        now = self._clock()
        if now - self._looked_at < _LOOK_SECONDS:
            return
        self._looked_at = now
        if (version := _version(self._path)) == self._version:
            return
        self._version = version
        try:
            self._keys = _by_digest(read_keys(self._path))
            _log.info("read %d API keys from %s", len(self._keys), self._path)
        except Error as err:
            _log.error("the API keys stay as they were: %s", err)


class AnyKey:
    """Takes every key for a user of its own, named by the key's hash."""

    def find(self, digest: bytes) -> Key | None:
        """Gives a key without any bounds."""
        name = digest.hex()[:12]
        return Key(key_id=name, user=f"key-{name}", digest=digest)


class Authenticator:
    """Checks the keys of calls."""

    def __init__(
        self,
        keys: Keys,
        attempts: BadAttempts,
        on_failure: Callable[[Reason], None] = lambda reason: None,
    ) -> None:
        """Makes it.

        Args:
            keys: those that are known.
            attempts: bounds guesses.
            on_failure: told why a call is refused.
        """
        self._keys = keys
        self._attempts = attempts
        self._on_failure = on_failure

    def check(self, metadata: Iterable[tuple[str, str | bytes]] | None, peer: str) -> Key:
        """Finds whose a call is; `caller` gives it from now on, while the call is answered.

        Args:
            metadata: the call's.
            peer: where it comes from, as gRPC writes it.

        Raises:
            AuthenticationError: it carries no key, or a wrong one.
            CapacityError: TOO_MANY_ATTEMPTS.
        """
        try:
            key = self._find(api_key(metadata), _host(peer))
        except Error as err:
            self._on_failure(err.reason)
            raise
        _CALLER.set(key)
        return key

    def _find(self, text: str, host: str) -> Key:
        digest, now = digest_of(text), time.monotonic()
        if wait := self._attempts.wait(host, digest, now=now):
            raise error(
                Reason.TOO_MANY_ATTEMPTS,
                "too many wrong API keys came from this address lately; try again in "
                f"{wait:.0f} seconds",
                retry_after_seconds=wait,
            )
        key = self._keys.find(digest)
        problem = key.problem(datetime.datetime.now(datetime.UTC)) if key else ""
        if key is None or problem:
            self._attempts.wrong(host, now=now)
            raise _invalid(f"the API key {key.key_id} {problem}" if key else "")
        self._attempts.right(host, digest)
        return key


class WithOperator:
    """Other keys, and one of whoever started the scheduler, who alone has it."""

    def __init__(self, keys: Keys, digest: bytes) -> None:
        self._keys = keys
        self._operator = Key(key_id="operator", user="operator", digest=digest, role="admin")

    def find(self, digest: bytes) -> Key | None:
        """Gives the key of a digest; None if it is nobody's."""
        found = self._keys.find(digest)
        return self._operator if hmac.compare_digest(self._operator.digest, digest) else found


def open_keys(api_keys_file: Path | None, operator_key_sha256: str = "") -> Keys:
    """Opens the keys that the settings name.

    Raises:
        ConfigurationError: the file can not be used.
    """
    keys = AnyKey() if api_keys_file is None else KeyFile(api_keys_file)
    return WithOperator(keys, bytes.fromhex(operator_key_sha256)) if operator_key_sha256 else keys


def api_key(metadata: Iterable[tuple[str, str | bytes]] | None) -> str:
    """Takes the API key out of a call's metadata.

    Raises:
        AuthenticationError: MISSING_CREDENTIAL if there is none.
    """
    for name, value in metadata or ():
        if name == API_KEY_METADATA and value:
            return value if isinstance(value, str) else value.decode("utf-8", "replace")
    raise error(
        Reason.MISSING_CREDENTIAL,
        "the call carries no API key; set one with CONFIG.set_default_api_key(...), or in "
        "INSITU_API_KEY",
    )


def check_admin(what: str) -> None:
    """Refuses what is for administrators to others.

    Raises:
        PermissionDeniedError: PERMISSION_DENIED.
    """
    if not caller().is_admin:
        raise error(
            Reason.PERMISSION_DENIED,
            f"{what} is for administrators; use a key that `insitu keys create --role admin` made",
        )


def check_model(model: str) -> None:
    """Refuses a model that the caller's key is not for.

    Raises:
        PermissionDeniedError: PERMISSION_DENIED.
    """
    key = caller()
    if not key.may_use(model):
        raise error(
            Reason.PERMISSION_DENIED,
            f"the API key {key.key_id} is not for the model {model!r}, only for "
            f"{', '.join(key.models)}; ask the server's operator",
            model=model,
            keyId=key.key_id,
        )


def _invalid(problem: str) -> Error:
    problem = problem or "the server does not know this API key"
    return error(
        Reason.INVALID_CREDENTIAL,
        f"{problem}; ask its operator for one, and set it with CONFIG.set_default_api_key(...) or "
        "INSITU_API_KEY",
    )


def _by_digest(keys: Iterable[Key]) -> dict[bytes, Key]:
    # Looked up by a part of the hash, which nobody can choose: then compared in constant time.
    return {key.digest[:8]: key for key in keys}


def _version(path: Path) -> tuple[int, int, int]:
    try:
        found = path.stat()
    except OSError:
        return 0, 0, 0
    return found.st_mtime_ns, found.st_ino, found.st_size


def _host(peer: str) -> str:
    """Takes the address out of a peer such as "ipv4:10.0.0.7:51234"."""
    return peer.rpartition(":")[0]
