"""Who a caller is: API keys, and the names of their users."""

from __future__ import annotations

import hashlib
import hmac
from typing import TYPE_CHECKING, Protocol

from insitu_wire.errors import Reason, error
from insitu_wire.limits import API_KEY_METADATA

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path


class Authenticator(Protocol):
    """Tells whose a key is."""

    def user(self, key: str) -> str:
        """Gives the name of a key's user.

        Raises:
            AuthenticationError: INVALID_CREDENTIAL if it is nobody's.
        """
        ...


class KeyFileAuthenticator:
    """Knows the keys of a file, by their hashes only."""

    def __init__(self, users_by_key: Mapping[str, str]) -> None:
        self._users_by_digest = {_digest(key): user for key, user in users_by_key.items()}

    def user(self, key: str) -> str:
        """Gives the name of a key's user; takes the same time whichever key it is."""
        wanted, found = _digest(key), None
        for digest, user in self._users_by_digest.items():
            if hmac.compare_digest(digest, wanted):
                found = user
        if found is None:
            raise error(
                Reason.INVALID_CREDENTIAL,
                "the server does not know this API key; ask its operator for one, and set it with "
                "CONFIG.set_default_api_key(...) or INSITU_API_KEY",
            )
        return found


class AnyKeyAuthenticator:
    """Takes every key for a user of its own, named by the key's hash."""

    def user(self, key: str) -> str:
        """Gives the name of a key's user."""
        return f"key-{_digest(key).hex()[:12]}"


def open_authenticator(api_keys_file: Path | None) -> Authenticator:
    """Makes the authenticator that the settings ask for.

    Raises:
        ConfigurationError: the file can not be used.
    """
    if api_keys_file is None:
        return AnyKeyAuthenticator()
    return KeyFileAuthenticator(read_keys(api_keys_file))


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


def read_keys(path: Path) -> dict[str, str]:
    """Reads the users by key from a file of lines USER:KEY; lines from # on are comments.

    Raises:
        ConfigurationError: the file can not be read, a line is wrong, or there is no key.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as exception:
        raise _unusable_file(path, f"can not be read ({exception})") from exception
    users_by_key: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        user, _, key = (part.strip() for part in line.partition(":"))
        if not user or not key:
            raise _unusable_file(path, f"has in line {number} something else than USER:KEY")
        if key in users_by_key:
            raise _unusable_file(path, f"gives in line {number} a key for the second time")
        users_by_key[key] = user
    if not users_by_key:
        raise _unusable_file(path, "holds no key")
    return users_by_key


def _unusable_file(path: Path, problem: str) -> Exception:
    return error(
        Reason.INVALID_CONFIGURATION,
        f"the key file {path} {problem}; --api-keys-file takes lines USER:KEY, # for comments",
        path=path,
    )


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
