"""What interceptors of servers have in common: they wrap the methods of some services."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Handler = grpc.RpcMethodHandler[Any, Any] | None
    Method = Callable[..., Any]


class MethodInterceptor(grpc.aio.ServerInterceptor):
    """Wraps the methods that concern it, and leaves all others alone."""

    def concerns(self, service: str) -> bool:
        """Whether it wraps the methods of a service, such as "insitu.v1.ShardService"."""
        raise NotImplementedError

    def wrap(self, handler: Any, path: str) -> Handler:
        """Gives the handler to answer with.

        Args:
            handler: answers without the interceptor.
            path: the method's, such as "/insitu.v1.ShardService/RunSegment".
        """
        raise NotImplementedError

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        """Wraps the method that is called."""
        handler = await continuation(handler_call_details)
        path = handler_call_details.method
        if handler is None or not self.concerns(path.split("/")[1]):
            return handler
        return self.wrap(handler, path)


def around(
    handler: Any, one: Callable[[Method], Method], many: Callable[[Method], Method]
) -> Handler:
    """Makes a handler of the same kind around the method of another.

    Args:
        handler: the other.
        one: wraps its method if that gives one response.
        many: wraps it if that gives a stream of them.
    """
    kind = (
        f"{'stream' if handler.request_streaming else 'unary'}_"
        f"{'stream' if handler.response_streaming else 'unary'}"
    )
    method = getattr(handler, kind)
    made: Handler = getattr(grpc, f"{kind}_rpc_method_handler")(
        many(method) if handler.response_streaming else one(method),
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )
    return made
