"""Serves /metrics, and /status while the scheduler leads, on the scheduler's event loop."""

from __future__ import annotations

import asyncio
import socket
from contextlib import contextmanager
from typing import TYPE_CHECKING

import uvicorn
from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route

from insitu_wire.errors import Reason, error
from insitu_wire.listening import endpoint, family

if TYPE_CHECKING:
    from collections.abc import Iterator

    from starlette.requests import Request

    from insitu_scheduler.metrics import SchedulerMetrics
    from insitu_scheduler.web.status_page import StatusPage

_GRACE_SECONDS = 1


class HttpServer:
    """An HTTP server that serves between start() and stop()."""

    def __init__(self, metrics: SchedulerMetrics) -> None:
        self._metrics = metrics
        self._status_page: StatusPage | None = None
        application = Starlette(
            routes=[
                Route("/", _go_to_status),
                Route("/metrics", self._show_metrics),
                Route("/status", self._show_status, methods=["GET", "POST"]),
            ]
        )
        # Requests are not logged, and what users send is not repeated in any error.
        config = uvicorn.Config(
            application,
            log_config=None,
            log_level="warning",
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_graceful_shutdown=_GRACE_SECONDS,
        )
        self._server = _Uvicorn(config)
        self._serving: asyncio.Task[None] | None = None
        self._listener: socket.socket | None = None
        self.address = ""

    async def start(self, host: str, port: int) -> None:
        """Starts to serve.

        Raises:
            ConfigurationError: the port can not be used.
        """
        self._listener = _listen(host, port)
        self.address = endpoint(host, self._listener.getsockname()[1])
        self._serving = asyncio.create_task(self._server.serve([self._listener]))

    async def stop(self) -> None:
        """Stops serving and frees the port."""
        self._server.should_exit = True
        if self._serving is not None:
            await self._serving
        if self._listener is not None:
            self._listener.close()

    @contextmanager
    def showing(self, status_page: StatusPage) -> Iterator[None]:
        """Shows a status page inside; before and after, /status says that there is none."""
        self._status_page = status_page
        try:
            yield
        finally:
            self._status_page = None

    async def _show_status(self, request: Request) -> Response:
        if (page := self._status_page) is None:
            return PlainTextResponse("This scheduler does not lead: it stands by.\n", 503)
        if request.method == "POST":
            return await page.show_sessions(request)
        return await page.show(request)

    async def _show_metrics(self, request: Request) -> Response:
        self._metrics.refresh()
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(self._metrics.registry), media_type=content_type)


class _Uvicorn(uvicorn.Server):
    """One that leaves signals to the scheduler."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Captures none."""
        yield


async def _go_to_status(request: Request) -> Response:
    return RedirectResponse("/status")


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=family(host))
    except OSError as exception:
        raise error(
            Reason.INVALID_CONFIGURATION,
            f"can not serve metrics on {host}:{port} ({exception.strerror}); choose a free "
            "port with --metrics-port, or 0",
            host=host,
            port=port,
        ) from exception
