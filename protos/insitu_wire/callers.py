"""Calls between the programs carry tokens, and a service lets those in alone that have them."""

from __future__ import annotations

import hmac
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from insitu_wire.errors import Reason, error
from insitu_wire.interception import MethodInterceptor, around
from insitu_wire.tls import peer_names

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping

    import grpc

    from insitu_wire.interception import Handler

    Context = grpc.aio.ServicerContext[Any, Any]


class CallerCheck(MethodInterceptor):
    """Asks callers of some services for a token, or for a name in their certificate."""

    def __init__(
        self,
        *services: str,
        metadata_key: str = "",
        token: str = "",
        names: frozenset[str] = frozenset(),
        also: Callable[[Context], None] | None = None,
    ) -> None:
        """Makes it; without token and names all may call.

        Args:
            services: full names of the services.
            metadata_key: where the token is.
            token: what calls have to carry.
            names: of which a caller's certificate has to have one.
            also: a further check of each call, that raises what the call is refused with.
        """
        self._also = also
        self._services = services
        self._metadata_key = metadata_key
        self._token = token
        self._names = names

    def concerns(self, service: str) -> bool:
        """Whether callers of a service are asked."""
        return service in self._services

    def wrap(self, handler: Any, path: str) -> Handler:
        """Checks the caller before a method is called."""
        return around(handler, self._checked_one, self._checked_many)

    def _checked_one(self, method: Any) -> Any:
        async def checked(request: Any, context: Context) -> Any:
            self._check(context)
            return await method(request, context)

        return checked

    def _checked_many(self, method: Any) -> Any:
        async def checked(request: Any, context: Context) -> AsyncIterator[Any]:
            self._check(context)
            async for response in method(request, context):
                yield response

        return checked

    def _check(self, context: Context) -> None:
        shown = dict(context.invocation_metadata() or ()).get(self._metadata_key, "")
        text = shown if isinstance(shown, str) else shown.decode("utf-8", "replace")
        has_token = hmac.compare_digest(text.encode(), self._token.encode())
        has_name = not self._names or not self._names.isdisjoint(peer_names(context))
        if not (has_token or not self._token) or not has_name:
            raise error(
                Reason.INVALID_CREDENTIAL,
                "this service is for the schedulers and shard groups of one deployment alone; give "
                "them the same join token, and certificates of their own CA where they use TLS",
            )
        if self._also is not None:
            self._also(context)


def carrying(channel: grpc.aio.Channel, metadata_key: str, token: str) -> grpc.aio.Channel:
    """Gives a channel for stubs whose calls all carry a token; if it is empty, the channel."""
    return carrying_all(channel, {metadata_key: token})


def carrying_all(channel: grpc.aio.Channel, values: Mapping[str, str]) -> grpc.aio.Channel:
    """Gives a channel for stubs whose calls all carry some metadata, but for what is empty."""
    metadata = tuple((key, value) for key, value in values.items() if value)
    return cast("grpc.aio.Channel", _Carrying(channel, metadata)) if metadata else channel


class _Carrying:
    """Makes the callables that stubs ask a channel for, each with metadata."""

    def __init__(self, channel: grpc.aio.Channel, metadata: tuple[tuple[str, str], ...]) -> None:
        self._channel = channel
        self._metadata = metadata

    def unary_unary(self, *args: Any, **kwargs: Any) -> Any:
        return partial(self._channel.unary_unary(*args, **kwargs), metadata=self._metadata)

    def unary_stream(self, *args: Any, **kwargs: Any) -> Any:
        return partial(self._channel.unary_stream(*args, **kwargs), metadata=self._metadata)

    def stream_unary(self, *args: Any, **kwargs: Any) -> Any:
        return partial(self._channel.stream_unary(*args, **kwargs), metadata=self._metadata)

    def stream_stream(self, *args: Any, **kwargs: Any) -> Any:
        return partial(self._channel.stream_stream(*args, **kwargs), metadata=self._metadata)
