"""The client's connection to the server."""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import grpc

from insitu_proto.v1 import scheduler_service_pb2_grpc
from insitu_wire.error_codec import from_rpc_error
from insitu_wire.errors import Reason, error
from insitu_wire.limits import API_KEY_METADATA, CHANNEL_OPTIONS
from insitu_wire.tls import client_credentials

if TYPE_CHECKING:
    from collections.abc import Iterator

    from insitu._config import Config
    from insitu_proto.v1.scheduler_service_pb2_grpc import SchedulerServiceStub

_SERVICE = "insitu.v1.SchedulerService"

# Every unary call is idempotent, so gRPC itself repeats what no server answered. Streams are
# resumed by who reads them: one that gRPC was to repeat was lost when servers came and went.
_SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": [
                {"service": _SERVICE, "method": "WatchSession"},
                {"service": _SERVICE, "method": "FetchResult"},
            ]
        },
        {
            "name": [{"service": _SERVICE}],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.2s",
                "maxBackoff": "2s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        },
    ]
}


class Connection:
    """Connects to the server that the configuration names, whenever a call is made."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._channel: grpc.Channel | None = None
        self.endpoint = ""
        self.has_answered = False
        """Whether a server has answered at the endpoint."""

    @contextmanager
    def call(self) -> Iterator[tuple[SchedulerServiceStub, tuple[tuple[str, str], ...]]]:
        """Gives the stub and the metadata of a call, and translates its errors."""
        if not self._config.api_key:
            raise error(
                Reason.MISSING_CREDENTIAL,
                "no API key is set: use CONFIG.set_default_api_key(...) or the variable "
                "INSITU_API_KEY",
            )
        try:
            yield self._stub(), ((API_KEY_METADATA, self._config.api_key),)
            self.has_answered = True
        except grpc.RpcError as rpc_error:
            # Every error that a stub raises is also the call that failed.
            call = cast("grpc.Call", rpc_error)
            raise from_rpc_error(call, address=self.endpoint) from None

    def close(self) -> None:
        """Closes the connection; the next call opens it again."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def _stub(self) -> SchedulerServiceStub:
        if self._channel is None or self.endpoint != self._config.endpoint:
            self.close()
            self.endpoint, self.has_answered = self._config.endpoint, False
            options = (*CHANNEL_OPTIONS, ("grpc.service_config", json.dumps(_SERVICE_CONFIG)))
            self._channel = (
                grpc.secure_channel(self.endpoint, client_credentials(ca), options=options)
                if (ca := self._config.tls_ca)
                else grpc.insecure_channel(self.endpoint, options=options)
            )
        return scheduler_service_pb2_grpc.SchedulerServiceStub(self._channel)
