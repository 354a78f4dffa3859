"""What a program tells of its health by grpc.health.v1: whether it serves, and whether it lives.

Probes of Kubernetes speak no TLS, and reach a scheduler that stands by, or a shard group that
loads, where nothing else listens yet. So they have a port of their own.
"""

from __future__ import annotations

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio

from insitu_wire.listening import listen

LIVENESS = "liveness"
"""The service to ask about for whether the program lives; the empty name asks whether it serves."""

_Status = health_pb2.HealthCheckResponse


class Health:
    """Does not serve at first, and lives."""

    def __init__(self, *service_names: str) -> None:
        """Makes it.

        Args:
            service_names: the services that it can be asked about, beside the program as a whole.
        """
        self._names = ("", *service_names)
        self._servicer = health_aio.HealthServicer()
        self._own_server: grpc.aio.Server | None = None

    async def start(self, host: str, port: int | None) -> None:
        """Begins to answer.

        Args:
            host: where the program listens.
            port: a port of its own, without TLS; None for none.

        Raises:
            ConfigurationError: the port can not be used.
        """
        await self._servicer.set(LIVENESS, _Status.SERVING)
        await self.set_serving(False)
        if port is None:
            return
        server = grpc.aio.server()
        self.add_to(server)
        listen(
            server.add_insecure_port,
            host,
            port,
            what=f"answer probes on port {port} of {host}",
            cure="--health-port, or -1 for none",
        )
        await server.start()
        self._own_server = server

    def add_to(self, server: grpc.aio.Server) -> None:
        """Has a server answer, too."""
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)

    async def set_serving(self, is_serving: bool) -> None:
        """Tells whether the program takes calls."""
        status = _Status.SERVING if is_serving else _Status.NOT_SERVING
        for name in self._names:
            await self._servicer.set(name, status)

    async def stop(self) -> None:
        """Gives up the port of its own."""
        if self._own_server is not None:
            await self._own_server.stop(None)
