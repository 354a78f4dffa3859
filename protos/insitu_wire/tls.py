"""TLS between the programs: certificates from files, read again when they change.

Schedulers and shard groups know each other by a name in their certificates, wherever they run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc

from insitu_wire.errors import Error, Reason, error
from insitu_wire.limits import CHANNEL_OPTIONS

if TYPE_CHECKING:
    from pathlib import Path

SCHEDULER_NAME = "insitu-scheduler"
"""The DNS name that a scheduler's certificate has among its subject alternative names."""

SHARD_NAME = "insitu-shard"
"""The DNS name that a shard group's certificate has among its subject alternative names."""


@dataclass(frozen=True, slots=True)
class Tls:
    """The files of one program: PEM each; all empty for no TLS."""

    cert: Path | None = None
    """Its certificate, with the chain below the root."""
    key: Path | None = None
    """The certificate's private key."""
    ca: Path | None = None
    """Roots of the certificates of scheduler and shard groups, which alone may call each other."""

    def check(self) -> None:
        """Refuses files that do not go together, or can not be read.

        Raises:
            ConfigurationError: what is wrong.
        """
        if (self.cert is None) != (self.key is None):
            raise _wrong("--tls-cert and --tls-key go together; give both, or none")
        if self.ca is not None and self.cert is None:
            raise _wrong("--tls-client-ca needs --tls-cert and --tls-key; give them too")
        for file in (self.cert, self.key, self.ca):
            if file is not None:
                _read(file)

    @property
    def is_on(self) -> bool:
        """Whether the program serves with TLS."""
        return self.cert is not None

    @property
    def is_mutual(self) -> bool:
        """Whether scheduler and shard groups show each other certificates."""
        return self.ca is not None

    def add_port(self, server: grpc.aio.Server, address: str, *, is_mutual: bool) -> int:
        """Has a server listen, and gives its port.

        Args:
            server: the server.
            address: where.
            is_mutual: whether callers must show a certificate of `ca`.
        """
        if self.cert is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, _ServerFiles(self, is_mutual).credentials())

    def channel(self, address: str, name: str) -> grpc.aio.Channel:
        """Opens a channel to a scheduler or shard group.

        Args:
            address: host:port.
            name: what its certificate has to have.
        """
        if self.cert is None or self.key is None or self.ca is None:
            return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        credentials = grpc.ssl_channel_credentials(
            _read(self.ca), _read(self.key), _read(self.cert)
        )
        options = (*CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", name))
        return grpc.aio.secure_channel(address, credentials, options=options)


class _ServerFiles:
    """Gives gRPC the files' content at each handshake, if it has changed."""

    def __init__(self, tls: Tls, is_mutual: bool) -> None:
        self._tls = tls
        self._is_mutual = is_mutual
        self._given = self._content()

    def credentials(self) -> grpc.ServerCredentials:
        credentials: grpc.ServerCredentials = grpc.dynamic_ssl_server_credentials(
            _configuration(self._given), self._fetch, self._is_mutual
        )
        return credentials

    def _fetch(self) -> Any:
        try:
            content = self._content()
        except Error:
            return None  # in the midst of being replaced
        if content == self._given:
            return None
        self._given = content
        return _configuration(content)

    def _content(self) -> tuple[bytes, bytes, bytes | None]:
        assert self._tls.cert is not None
        assert self._tls.key is not None
        roots = _read(self._tls.ca) if self._is_mutual and self._tls.ca else None
        return _read(self._tls.key), _read(self._tls.cert), roots


def peer_names(context: grpc.aio.ServicerContext[Any, Any]) -> set[str]:
    """Gives the names in the certificate that a caller has shown."""
    names = context.auth_context().get("x509_subject_alternative_name", ())
    return {name.decode("utf-8", "replace") for name in names}


def client_credentials(ca: str) -> grpc.ChannelCredentials:
    """Makes what a client needs to know a server by.

    Args:
        ca: file with the roots of its certificate, or "system" for those that gRPC comes with.

    Raises:
        ConfigurationError: the file can not be read.
    """
    from pathlib import Path

    return grpc.ssl_channel_credentials(None if ca == "system" else _read(Path(ca)))


def _configuration(content: tuple[bytes, bytes, bytes | None]) -> Any:
    key, cert, roots = content
    return grpc.ssl_server_certificate_configuration([(key, cert)], roots)


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as exception:
        raise _wrong(
            f"the file {file} can not be read ({exception.strerror}); it must hold PEM"
        ) from exception


def _wrong(message: str) -> Error:
    return error(Reason.INVALID_CONFIGURATION, message)
