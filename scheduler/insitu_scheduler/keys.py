"""API keys as they are written down: by their hashes, with what each of them allows."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import secrets
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from insitu_scheduler.limits import Limits
from insitu_scheduler.terms import Tier
from insitu_wire.errors import Error, Reason, error

if TYPE_CHECKING:
    from pathlib import Path

ROLES = ("user", "admin")
_FIELDS = {
    "id", "user", "sha256", "role", "tier", "weight", "models", "limits", "created_at",
    "expires_at", "revoked_at",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One API key; the key itself is known to its user alone."""

    key_id: str
    """Names it where the key must not be shown."""
    user: str
    digest: bytes
    """SHA-256 of the key."""
    role: str = "user"
    tier: Tier = Tier.DEFAULT
    """The most that its sessions may ask for."""
    weight: float = 1.0
    """Of its user, beside others."""
    models: tuple[str, ...] = ("*",)
    """Names of the models that it is for, or patterns with * and ?."""
    limits: Limits = field(default_factory=Limits)
    created_at: datetime.datetime | None = None
    expires_at: datetime.datetime | None = None
    revoked_at: datetime.datetime | None = None

    @property
    def is_admin(self) -> bool:
        """Whether it may do what is for administrators."""
        return self.role == "admin"

    def may_use(self, model: str) -> bool:
        """Whether it is for a model."""
        return any(fnmatchcase(model, pattern) for pattern in self.models)

    def problem(self, now: datetime.datetime) -> str:
        """Says why it is not accepted any more; empty if it is."""
        if self.revoked_at is not None:
            return "was revoked"
        if self.expires_at is not None and self.expires_at <= now:
            return f"has expired on {self.expires_at:%Y-%m-%d %H:%M} UTC"
        return ""


def digest_of(key: str) -> bytes:
    """Gives what is kept of a key: keys are random and long, so that no hash of it is too fast."""
    return hashlib.sha256(key.encode()).digest()


def new_key(user: str, **allowed: Any) -> tuple[str, Key]:
    """Makes a key: what its user is given, and what is kept of it."""
    key_id = secrets.token_hex(6)
    # The beginning tells secret scanners what it is.
    text = f"insitu_{key_id}_{secrets.token_hex(32)}"
    created_at = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    return text, Key(
        key_id=key_id, user=user, digest=digest_of(text), created_at=created_at, **allowed
    )


def read_keys(path: Path) -> list[Key]:
    """Reads a file of keys: what `insitu keys` writes, or lines USER:KEY with # for comments.

    Raises:
        ConfigurationError: the file can not be read, or something in it is wrong.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exception:
        raise _unusable(path, f"can not be read ({exception})") from exception
    try:
        keys = _parse_json(text) if text.lstrip().startswith("{") else _parse_lines(text)
    except ValueError as exception:
        raise _unusable(path, str(exception)) from exception
    if len({key.digest for key in keys}) < len(keys) or len({key.key_id for key in keys}) < len(
        keys
    ):
        raise _unusable(path, "gives a key for the second time")
    return keys


def write_keys(path: Path, keys: list[Key]) -> None:
    """Writes a file of keys, whole or not at all, for its owner alone to read.

    Raises:
        ConfigurationError: it can not be written.
    """
    draft = path.with_name(f"{path.name}.new")
    try:
        draft.unlink(missing_ok=True)
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump({"keys": [_to_json(key) for key in keys]}, file, indent=2)
            file.write("\n")
        draft.replace(path)
    except OSError as exception:
        raise _unusable(path, f"can not be written ({exception.strerror})") from exception


def _parse_lines(text: str) -> list[Key]:
    keys: list[Key] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        user, _, key = (part.strip() for part in line.partition(":"))
        if not user or not key:
            raise ValueError(f"has in line {number} something else than USER:KEY")
        digest = digest_of(key)
        if any(digest == known.digest for known in keys):
            raise ValueError(f"gives in line {number} a key for the second time")
        keys.append(Key(key_id=digest.hex()[:12], user=user, digest=digest))
    if not keys:
        raise ValueError("holds no key")
    return keys


def _parse_json(text: str) -> list[Key]:
    try:
        entries = json.loads(text)["keys"]
        return [_from_json(entry, number) for number, entry in enumerate(entries, start=1)]
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as exception:
        # What the file holds is not shown.
        raise ValueError(f"is not what `insitu keys` writes ({type(exception).__name__})") from None


def _from_json(entry: dict[str, Any], number: int) -> Key:
    if unknown := entry.keys() - _FIELDS:
        raise ValueError(f"has in key {number} the unknown field {sorted(unknown)[0]!r}")
    if entry.get("role", "user") not in ROLES:
        raise ValueError(f"has in key {number} a role that is none of {', '.join(ROLES)}")
    if (tier := entry.get("tier", "default").upper()) not in Tier.__members__:
        raise ValueError(f"has in key {number} a tier that is none of {tier_names()}")
    if not (weight := float(entry.get("weight", 1.0))) > 0:
        raise ValueError(f"has in key {number} a weight that is not above 0")
    if len(digest := bytes.fromhex(entry["sha256"])) != hashlib.sha256().digest_size:
        raise ValueError(f"has in key {number} no SHA-256")
    return Key(
        key_id=str(entry["id"]),
        user=str(entry["user"]),
        digest=digest,
        role=entry.get("role", "user"),
        tier=Tier[tier],
        weight=weight,
        models=tuple(entry.get("models", ["*"])),
        limits=Limits.read(entry.get("limits", {})),
        **{name: _time(entry.get(name)) for name in ("created_at", "expires_at", "revoked_at")},
    )


def _to_json(key: Key) -> dict[str, object]:
    times = {name: getattr(key, name) for name in ("created_at", "expires_at", "revoked_at")}
    return {
        "id": key.key_id,
        "user": key.user,
        "sha256": key.digest.hex(),
        "role": key.role,
        "tier": key.tier.name.lower(),
        "weight": key.weight,
        "models": list(key.models),
        "limits": key.limits.written(),
        **{name: time.isoformat() for name, time in times.items() if time is not None},
    }


def tier_names() -> str:
    """Gives the names of the tiers, for messages."""
    return ", ".join(tier.name.lower() for tier in Tier)


def _time(text: str | None) -> datetime.datetime | None:
    if not text:
        return None
    time = datetime.datetime.fromisoformat(text)
    return time if time.tzinfo else time.replace(tzinfo=datetime.UTC)


def _unusable(path: Path, problem: str) -> Error:
    return error(
        Reason.INVALID_CONFIGURATION,
        f"the key file {path} {problem}; `insitu keys create` makes one, or write lines USER:KEY, "
        "with # for comments",
        path=path,
    )
