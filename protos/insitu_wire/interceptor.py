"""Maps the exceptions of a gRPC server's methods to statuses, in one place."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.message import DecodeError
from grpc_status import rpc_status

from insitu_wire.error_codec import to_status
from insitu_wire.errors import Error, Reason, error
from insitu_wire.interception import MethodInterceptor, around

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from insitu_wire.interception import Handler

    Context = grpc.aio.ServicerContext[Any, Any]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Answer:
    """How a call ended."""

    method: str
    """Name of the method, such as "SubmitSession"."""
    code: str
    """Name of the gRPC status, such as "OK"."""
    seconds: float


class ErrorInterceptor(MethodInterceptor):
    """Answers our errors with their status, and anything else as INTERNAL with a log id only."""

    def __init__(self, on_answered: Callable[[Answer], None] | None = None) -> None:
        """Makes it.

        Args:
            on_answered: called after each call of a method of ours.
        """
        self._on_answered = on_answered

    def concerns(self, service: str) -> bool:
        """Whether the service is one of ours."""
        return service.startswith("insitu.")

    def wrap(self, handler: Any, path: str) -> Handler:
        """Guards a method."""
        return around(
            handler,
            lambda method: self._guard_unary(method, path),
            lambda method: self._guard_stream(method, path),
        )

    def _guard_unary(
        self, method: Callable[..., Awaitable[Any]], path: str
    ) -> Callable[..., Awaitable[Any]]:
        async def guarded(request: Any, context: Context) -> Any:
            async with self._answering(context, path):
                return await method(request, context)

        return guarded

    def _guard_stream(
        self, method: Callable[..., AsyncIterator[Any]], path: str
    ) -> Callable[..., AsyncIterator[Any]]:
        async def guarded(request: Any, context: Context) -> AsyncIterator[Any]:
            async with self._answering(context, path):
                async for response in method(request, context):
                    yield response

        return guarded

    @asynccontextmanager
    async def _answering(self, context: Context, path: str) -> AsyncIterator[None]:
        started, code = time.perf_counter(), grpc.StatusCode.CANCELLED
        try:
            async with _mapped(context):
                yield
            code = grpc.StatusCode.OK
        except grpc.aio.AbortError:
            code = _code(context)
            raise
        finally:
            if self._on_answered is not None:
                seconds = time.perf_counter() - started
                self._on_answered(Answer(path.rpartition("/")[2], code.name, seconds))


def _code(context: Context) -> grpc.StatusCode:
    """Gives the status that a call was ended with."""
    code: Any = context.code()
    by_number = {status.value[0]: status for status in grpc.StatusCode}
    return code if isinstance(code, grpc.StatusCode) else by_number[code]


@asynccontextmanager
async def _mapped(context: Context) -> AsyncIterator[None]:
    try:
        yield
    except Error as err:
        await context.abort_with_status(rpc_status.to_status(to_status(err)))
    except DecodeError as exception:
        broken = error(
            Reason.MALFORMED_SESSION,
            f"the message is none of the contract ({exception}); use insitu's own client, or code "
            "that protoc made of insitu_proto",
        )
        await context.abort_with_status(rpc_status.to_status(to_status(broken)))
    except (asyncio.CancelledError, GeneratorExit, grpc.aio.AbortError):
        raise
    except Exception:  # noqa: BLE001 - the one place where the unforeseen is answered
        log_id = uuid.uuid4().hex[:12]
        _log.exception("unforeseen error %s", log_id)
        flaw = error(
            Reason.INTERNAL,
            f"the server met a flaw of its own; its log has it under {log_id}",
            logId=log_id,
        )
        await context.abort_with_status(rpc_status.to_status(to_status(flaw)))
