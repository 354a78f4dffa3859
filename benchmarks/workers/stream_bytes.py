"""A bare gRPC stream of bytes in chunks of 1 MiB: `ADDRESS_FILE serve`, or `ADDRESS SIZE read`."""

import asyncio
import sys
from pathlib import Path

import grpc

from insitu_wire.limits import CHANNEL_OPTIONS, CHUNK_BYTES, SERVER_OPTIONS

METHOD = "/bench.Stream/Bytes"


class Handler(grpc.GenericRpcHandler):
    def service(self, details):
        return grpc.unary_stream_rpc_method_handler(self.stream)

    async def stream(self, request, context):
        data = bytes(CHUNK_BYTES)
        for _ in range(int(request) // CHUNK_BYTES):
            yield data


async def serve_bytes(path):
    server = grpc.aio.server(options=SERVER_OPTIONS)
    server.add_generic_rpc_handlers([Handler()])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    part = path.with_suffix(".part")
    part.write_text(f"127.0.0.1:{port}")
    part.rename(path)
    await server.wait_for_termination()


def read(address, size):
    with grpc.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        received = bytearray()
        for chunk in channel.unary_stream(METHOD)(str(size).encode()):
            received += chunk
    return len(received)


if sys.argv[-1] == "serve":
    asyncio.run(serve_bytes(Path(sys.argv[1])))
else:
    from _serve import serve

    serve(run=lambda: read(sys.argv[1], int(sys.argv[2])))
