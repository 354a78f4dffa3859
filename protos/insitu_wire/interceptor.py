"""Maps the exceptions of a gRPC server's methods to statuses, in one place."""

from __future__ import annotations

import asyncio
import logging
import uuid
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, cast

import grpc
from grpc_status import rpc_status

from insitu_wire.errors import Error, Reason, error, to_status

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    Handler = grpc.RpcMethodHandler[Any, Any] | None
    Context = grpc.aio.ServicerContext[Any, Any]

_log = logging.getLogger(__name__)


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Answers our errors with their status, and anything else as INTERNAL with a log id only."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        """Wraps the method that is called."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or not method.startswith("/insitu."):
            return handler
        serializers = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        if handler.response_streaming:
            stream = handler.unary_stream or handler.stream_stream
            make = (
                grpc.stream_stream_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_stream_rpc_method_handler
            )
            return make(_guard_stream(cast("Any", stream)), **serializers)
        guarded = _guard_unary(cast("Any", handler.unary_unary or handler.stream_unary))
        make_unary = (
            grpc.stream_unary_rpc_method_handler
            if handler.request_streaming
            else grpc.unary_unary_rpc_method_handler
        )
        return make_unary(guarded, **serializers)


def _guard_unary(method: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    async def guarded(request: Any, context: Context) -> Any:
        async with _mapped(context):
            return await method(request, context)

    return guarded


def _guard_stream(method: Callable[..., AsyncIterator[Any]]) -> Callable[..., AsyncIterator[Any]]:
    async def guarded(request: Any, context: Context) -> AsyncIterator[Any]:
        async with _mapped(context):
            async for response in method(request, context):
                yield response

    return guarded


@asynccontextmanager
async def _mapped(context: Context) -> AsyncIterator[None]:
    try:
        yield
    except Error as err:
        await context.abort_with_status(rpc_status.to_status(to_status(err)))
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
