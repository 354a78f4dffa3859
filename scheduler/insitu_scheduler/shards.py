"""The scheduler's side of the shard service."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, cast

import grpc
from grpc_status import rpc_status

from insitu_proto.v1 import shard_service_pb2, shard_service_pb2_grpc
from insitu_proto.v1.shard_service_pb2 import Import
from insitu_scheduler.models import TokenizerFile
from insitu_wire.batching import apart
from insitu_wire.callers import carrying_all
from insitu_wire.error_codec import from_rpc_error
from insitu_wire.errors import Error, Reason, error
from insitu_wire.limits import ACCESS_TOKEN_METADATA, EPOCH_METADATA
from insitu_wire.tls import SHARD_NAME, Tls

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Sequence

    from insitu_proto.v1.model_pb2 import ModelDescription
    from insitu_proto.v1.shard_service_pb2 import RunSegmentRequest, RunSegmentResponse
    from insitu_proto.v1.tensor_pb2 import Tensor
    from insitu_scheduler.queue import SessionId

_log = logging.getLogger(__name__)

_DESCRIBE_SECONDS = 60.0
_NO_TLS = Tls()
# A command waits for the pass that runs.
_PAUSE_SECONDS = 600.0
_GONE = "its leader does not answer any more"


class ShardClient:
    """One open connection to the leader of a shard group."""

    def __init__(
        self, address: str, *, access_token: str = "", tls: Tls = _NO_TLS, epoch: int = 0
    ) -> None:
        """Opens a connection.

        Args:
            address: the leader's, as host:port.
            access_token: what the group wants calls to carry.
            tls: how the scheduler shows who it is.
            epoch: of this scheduler's lead; all orders carry it.
        """
        self.address = address
        self.access_token = access_token
        self._channel = tls.channel(address, SHARD_NAME)
        self._stub = shard_service_pb2_grpc.ShardServiceStub(
            carrying_all(
                self._channel,
                {ACCESS_TOKEN_METADATA: access_token, EPOCH_METADATA: str(epoch or "")},
            )
        )

    async def describe(self, model: str) -> ModelDescription:
        """Asks for the model's structure.

        Raises:
            Error: the group does not answer.
        """
        request = shard_service_pb2.DescribeModelRequest(model=model)
        try:
            response = await self._stub.DescribeModel(request, timeout=_DESCRIBE_SECONDS)
        except grpc.aio.AioRpcError as rpc_error:
            raise self._lost(rpc_error) from rpc_error
        return response.description

    async def fetch_tokenizer(self, model: str) -> tuple[TokenizerFile, ...]:
        """Asks for the files of the model's tokenizer.

        Raises:
            Error: the group does not answer.
        """
        request = shard_service_pb2.FetchTokenizerRequest(model=model)
        files: dict[str, list[bytes]] = {}
        try:
            async for part in self._stub.FetchTokenizer(request, timeout=_DESCRIBE_SECONDS):
                files.setdefault(part.file_name, []).append(part.data)
        except grpc.aio.AioRpcError as rpc_error:
            raise self._lost(rpc_error) from rpc_error
        return tuple(TokenizerFile(name, b"".join(parts)) for name, parts in files.items())

    async def hold_uploads(self, session_id: SessionId, tensors: Sequence[Tensor]) -> list[str]:
        """Holds uploaded tensors for a session; gives the content hashes of those to be stored.

        Raises:
            Error: REQUEST_TOO_LARGE, or REPLICA_LOST if the group is gone.
        """
        request = shard_service_pb2.HoldUploadsRequest(session_id=session_id, tensors=tensors)
        try:
            response = await self._stub.HoldUploads(request)
        except grpc.aio.AioRpcError as rpc_error:
            raise self._refused(rpc_error) from rpc_error
        return list(response.content_hashes)

    async def store_upload(self, tensor: Tensor, data: AsyncIterator[bytes]) -> None:
        """Stores an uploaded tensor on all ranks.

        Raises:
            Error: why it can not be, or REPLICA_LOST if the group is gone.
        """
        try:
            await self._stub.StoreUpload(_store_requests(tensor, data))
        except grpc.aio.AioRpcError as rpc_error:
            raise self._refused(rpc_error) from rpc_error

    async def run_segment(self, request: RunSegmentRequest) -> AsyncGenerator[RunSegmentResponse]:
        """Runs a segment and yields what happens; closing the iterator cancels it.

        Raises:
            Error: REPLICA_LOST if the group is gone, INTERNAL if it met a flaw of its own.
        """
        call = self._stub.RunSegment(request)
        try:
            async for response in call:
                for part in apart(response):
                    yield part
        except grpc.aio.AioRpcError as rpc_error:
            raise self._lost(rpc_error) from rpc_error
        finally:
            call.cancel()

    async def release(self, session_id: SessionId, *, timeout_seconds: float) -> None:
        """Frees a session's values; a group that is gone has freed them in its own way."""
        request = shard_service_pb2.ReleaseSessionRequest(session_id=session_id)
        try:
            await self._stub.ReleaseSession(request, timeout=timeout_seconds)
        except grpc.aio.AioRpcError as rpc_error:
            _log.warning(
                "the shard group at %s did not release session %s: %s",
                self.address, session_id, rpc_error.details(),
            )  # fmt: skip

    async def pause(self, session_id: SessionId, *, goes_on: bool) -> None:
        """Holds a session's segment before its next trace, or lets it go on.

        Raises:
            Error: REPLICA_LOST if the group is gone.
        """
        request = shard_service_pb2.PauseSessionRequest(session_id=session_id, goes_on=goes_on)
        try:
            await self._stub.PauseSession(request, timeout=_PAUSE_SECONDS)
        except grpc.aio.AioRpcError as rpc_error:
            raise self._lost(rpc_error) from rpc_error

    async def release_handle(self, user: str, handle_id: str) -> bool:
        """Lets go of a kept value; tells whether there was one.

        Raises:
            Error: REPLICA_LOST if the group is gone.
        """
        request = shard_service_pb2.ReleaseHandleRequest(user=user, handle_id=handle_id)
        try:
            response = await self._stub.ReleaseHandle(request)
        except grpc.aio.AioRpcError as rpc_error:
            raise self._lost(rpc_error) from rpc_error
        return response.had_value

    def importing(self, node_ids: Sequence[int]) -> Import:
        """Tells another group how it gets values of a session that this group has."""
        return Import(address=self.address, node_ids=node_ids, access_token=self.access_token)

    async def close(self) -> None:
        """Closes the connection, and with it what still runs over it."""
        await self._channel.close()

    def _refused(self, rpc_error: grpc.aio.AioRpcError) -> Error:
        """Gives what the group itself answered, or that it is lost."""
        if rpc_status.from_call(cast("grpc.Call", rpc_error)) is None:
            # gRPC calls a stream that breaks while it is written to INTERNAL.
            _log.warning("the shard group at %s is lost: %s", self.address, rpc_error.details())
            return replica_lost(_GONE)
        return from_rpc_error(rpc_error, address=self.address)

    def _lost(self, rpc_error: grpc.aio.AioRpcError) -> Error:
        if rpc_error.code() is grpc.StatusCode.INTERNAL:
            return from_rpc_error(rpc_error, address=self.address)
        _log.warning("the shard group at %s is lost: %s", self.address, rpc_error.details())
        return replica_lost(_GONE)


async def _store_requests(
    tensor: Tensor, data: AsyncIterator[bytes]
) -> AsyncIterator[shard_service_pb2.StoreUploadRequest]:
    yield shard_service_pb2.StoreUploadRequest(tensor=tensor)
    async for chunk in data:
        yield shard_service_pb2.StoreUploadRequest(data=chunk)


def replica_lost(why: str) -> Error:
    """Makes the error of a session whose shard group went away, with what is known of how."""
    return error(
        Reason.REPLICA_LOST,
        f"the shard group that ran the session was lost: {why}; submit the session again",
        why=why,
    )
