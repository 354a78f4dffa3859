"""Settings of a scheduler."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from insitu_scheduler.limits import Limits
from insitu_wire.errors import Reason, error
from insitu_wire.limits import MAX_SESSION_BYTES
from insitu_wire.tls import Tls

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Settings of one scheduler."""

    data_dir: Path
    """Folder of journal, results and uploads; made if missing, used by one scheduler at a time."""
    journal: str | None = None
    """URL of the journal, as `postgresql://...`; None for a SQLite file in the data folder."""
    results: str | None = None
    """Where results are, as `s3://BUCKET/PREFIX`; None for a folder in the data folder."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 7433
    """Port to listen on; 0 takes a free one."""
    metrics_port: int | None = 0
    """Port of /metrics; 0 takes a free one, None serves none."""
    health_port: int | None = None
    """Port that answers probes without TLS, also while the scheduler stands by; None for none."""
    api_keys_file: Path | None = None
    """File of API keys, as `insitu keys` writes it or with lines USER:KEY; without one any key is
    accepted, on a loopback host only."""
    operator_key_sha256: str = ""
    """SHA-256 of a key of whoever starts the scheduler, an administrator, in hexadecimal digits."""
    tls: Tls = field(default_factory=Tls)
    """Certificates; without any, nothing is encrypted."""
    shard_port: int | None = None
    """Port that shard groups register at with certificates of `tls.ca`; 0 takes a free one."""
    join_token: str = field(default="", repr=False)
    """What shard groups have to know to register; empty lets all."""
    has_reflection: bool = True
    """Whether gRPC reflection tells callers what services there are."""
    limits: Limits = field(default_factory=Limits)
    """What each session and user may take, beside what their API keys say."""
    max_session_bytes: int = MAX_SESSION_BYTES
    """Largest session, in bytes."""
    upload_store_bytes: int = 64 * 1024**3
    """Room for tensors that users upload, in bytes; those used least recently make room."""
    max_queued_sessions: int = 10_000
    """Sessions that may wait; more are refused with QUEUE_FULL."""
    max_attempts: int = 3
    """How often a session is run at most, if what runs it is lost each time."""
    max_wait_seconds: float = 600.0
    """How long a user may wait for a turn, however much more than the others the user has had."""
    model_turn_seconds: float = 60.0
    """How long a host keeps a model loaded that is in use, while others wait for its memory."""
    quantum_seconds: float = 30.0
    """How much shard time a session has before it may have to wait again while others wait."""
    retention_seconds: float = 7 * 24 * 3600.0
    """How long a session that has ended is kept, with what it saved."""
    lease_ttl_seconds: float = 10.0
    """How long a shard group may be silent before it is given up."""
    orphan_grace_seconds: float = 5.0
    """How long an attached session lives without anybody watching it, also before the first."""
    grace_seconds: float = 10.0
    """How long running sessions and downloads may still take once the scheduler is told to stop."""

    def __post_init__(self) -> None:
        _check_port("--port", self.port)
        self.tls.check()
        if self.tls.is_mutual != (self.shard_port is not None):
            raise error(
                Reason.INVALID_CONFIGURATION,
                "--tls-client-ca and --shard-port go together: clients show no certificates, so "
                "shard groups have a port of their own; give both, or none",
            )
        for flag, port in (
            ("--shard-port", self.shard_port),
            ("--metrics-port", self.metrics_port),
            ("--health-port", self.health_port),
        ):
            if port is not None:
                _check_port(flag, port)
        size = self.max_session_bytes
        _check(
            "--max-session-bytes", size, f"1 to {MAX_SESSION_BYTES}", 0 < size <= MAX_SESSION_BYTES
        )
        size = self.upload_store_bytes
        _check("--upload-store-bytes", size, "0 or more", size >= 0)
        for flag, count in (
            ("--max-queued-sessions", self.max_queued_sessions),
            ("--max-attempts", self.max_attempts),
        ):
            _check(flag, count, "1 or more", count >= 1)
        for flag, seconds in (
            ("--lease-ttl-seconds", self.lease_ttl_seconds),
            ("--max-wait-seconds", self.max_wait_seconds),
            ("--model-turn-seconds", self.model_turn_seconds),
            ("--quantum-seconds", self.quantum_seconds),
            ("--retention-seconds", self.retention_seconds),
        ):
            _check(flag, seconds, "more than 0", seconds > 0)
        for flag, seconds in (
            ("--orphan-grace-seconds", self.orphan_grace_seconds),
            ("--grace-seconds", self.grace_seconds),
        ):
            _check(flag, seconds, "0 or more", seconds >= 0)
        for name, bound in asdict(self.limits).items():
            flag = f"--{name.replace('_', '-')}"
            _check(flag, bound, "more than 0", bound is None or bound > 0)
        if not re.fullmatch(r"([0-9a-f]{64})?", self.operator_key_sha256):
            raise error(
                Reason.INVALID_CONFIGURATION,
                "--operator-key-sha256 is not a SHA-256; it must be 64 hexadecimal digits",
            )
        if self.api_keys_file is None and not is_loopback(self.host):
            raise error(
                Reason.INVALID_CONFIGURATION,
                f"--host is {self.host}, which other machines reach, and there is no key file; "
                "make one with `insitu keys create` and give it with --api-keys-file, or listen on "
                "127.0.0.1",
                host=self.host,
            )


def _check_port(flag: str, port: int) -> None:
    _check(flag, port, "0 (a free one) to 65535", 0 <= port <= 65535)


def _check(flag: str, value: float | None, allowed: str, is_allowed: bool) -> None:
    if not is_allowed:
        raise error(
            Reason.INVALID_CONFIGURATION,
            f"{flag} is {value}; it must be {allowed}",
            setting=flag,
            value=value,
        )


def is_loopback(host: str) -> bool:
    """Whether an address is reached from its own machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
