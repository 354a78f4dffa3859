"""Lets calls of clients in: whose a call is comes first, then its size, and then what it says."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, cast

import grpc

from insitu_scheduler.auth import caller
from insitu_scheduler.refusals import check_limit
from insitu_wire.interception import MethodInterceptor
from insitu_wire.limits import CHUNK_BYTES, MAX_MESSAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from insitu_scheduler.auth import Authenticator
    from insitu_wire.interception import Handler

    Context = grpc.aio.ServicerContext[Any, Any]
    Parse = Callable[[bytes], Any]

_SERVICE = "insitu.v1.SchedulerService"
# A chunk of a tensor. Parsing larger messages would hold up the event loop.
_MAX_INLINE_BYTES = CHUNK_BYTES + 64 * 1024


class Gate(MethodInterceptor):
    """Authenticates before a message is read, and bounds what is parsed at the same time.

    A message takes many times its size once it is parsed, if somebody means it to: two bytes make
    an empty step. So large ones are parsed one after the other, and none that the caller's key
    does not allow.
    """

    def __init__(self, authenticator: Authenticator) -> None:
        self._authenticator = authenticator
        self._parsing_large = asyncio.Lock()

    def concerns(self, service: str) -> bool:
        """Whether it is the clients' service."""
        return service == _SERVICE

    def wrap(self, handler: Any, path: str) -> Handler:
        """Lets calls of a method in."""
        requests = self._stream if handler.request_streaming else self._single
        parse = cast("Parse", handler.request_deserializer)
        if handler.response_streaming:
            stream = cast("Any", handler.stream_stream or handler.unary_stream)
            return grpc.stream_stream_rpc_method_handler(
                self._answer_many(stream, requests, parse),
                response_serializer=handler.response_serializer,
            )
        unary = cast("Any", handler.stream_unary or handler.unary_unary)
        return grpc.stream_unary_rpc_method_handler(
            self._answer_one(unary, requests, parse),
            response_serializer=handler.response_serializer,
        )

    def _answer_one(self, method: Any, requests: Any, parse: Parse) -> Any:
        async def answer(messages: AsyncIterator[bytes], context: Context) -> Any:
            self._authenticator.check(context.invocation_metadata(), context.peer())
            return await method(await requests(messages, parse), context)

        return answer

    def _answer_many(self, method: Any, requests: Any, parse: Parse) -> Any:
        async def answer(messages: AsyncIterator[bytes], context: Context) -> AsyncIterator[Any]:
            self._authenticator.check(context.invocation_metadata(), context.peer())
            async for response in method(await requests(messages, parse), context):
                yield response

        return answer

    async def _single(self, messages: AsyncIterator[bytes], parse: Parse) -> Any:
        message = await anext(messages, b"")
        check_limit("bytes", len(message), caller().limits.max_request_bytes or MAX_MESSAGE_BYTES)
        return await self._parse(message, parse)

    async def _stream(self, messages: AsyncIterator[bytes], parse: Parse) -> AsyncIterator[Any]:
        return (await self._parse(message, parse) async for message in messages)

    async def _parse(self, message: bytes, parse: Parse) -> Any:
        if len(message) <= _MAX_INLINE_BYTES:
            return parse(message)
        async with self._parsing_large:
            return await asyncio.to_thread(parse, message)
