"""Brings values of a session over from the group of another model that the session uses.

A value is whole on every rank of both groups, however the models are split: it comes over once, to
the leader, who broadcasts it (docs/adr/0023-values-move-whole.md).
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import grpc

from insitu_proto.v1 import shard_service_pb2, shard_service_pb2_grpc
from insitu_wire import torch_codec
from insitu_wire.callers import carrying
from insitu_wire.errors import Reason, error
from insitu_wire.limits import ACCESS_TOKEN_METADATA
from insitu_wire.saved_values import is_whole
from insitu_wire.tls import SHARD_NAME

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from insitu_shard.engine import HandleStore
    from insitu_wire.tls import Tls


async def fetch_values(
    request: shard_service_pb2.RunSegmentRequest, source: shard_service_pb2.Import, tls: Tls
) -> tuple[shard_service_pb2.ImportedValues, list[bytearray]]:
    """Asks another group for values.

    Returns:
        What came, and the elements of each value.

    Raises:
        UnavailableError: REPLICA_LOST, if the group does not answer.
        InternalError: CHECKSUM_MISMATCH, if what came is not what was sent.
    """
    asked = shard_service_pb2.FetchValuesRequest(
        session_id=request.session_id, node_ids=source.node_ids
    )
    imported = shard_service_pb2.ImportedValues(
        session_id=request.session_id, node_ids=source.node_ids
    )
    data: list[bytearray] = []
    try:
        async with tls.channel(source.address, SHARD_NAME) as channel:
            stub = shard_service_pb2_grpc.ShardServiceStub(
                carrying(channel, ACCESS_TOKEN_METADATA, source.access_token)
            )
            async for response in stub.FetchValues(asked):
                if response.HasField("value"):
                    imported.values.append(response.value)
                    data.append(bytearray())
                else:
                    data[-1] += response.data
    except grpc.aio.AioRpcError as rpc_error:
        raise error(
            Reason.REPLICA_LOST,
            f"the shard group at {source.address}, which has values of this session, does not "
            f"answer ({rpc_error.code().name}); submit the session again",
            address=source.address,
            why="a group that has values of the session does not answer",
        ) from rpc_error
    for value, content in zip(imported.values, data, strict=True):
        if zlib.crc32(content) != value.crc32 or not is_whole(value):
            raise error(
                Reason.CHECKSUM_MISMATCH,
                f"value {value.node_id} arrived damaged from {source.address}; submit the session "
                "again",
                nodeId=value.node_id,
            )
    return imported, data


def keep_values(
    handles: HandleStore,
    imported: shard_service_pb2.ImportedValues,
    data: Sequence[bytearray],
    *,
    device: torch.device,
) -> None:
    """Keeps what came, on this rank; what was asked for and did not come is not set."""
    values = handles.values(imported.session_id)
    for node_id in imported.node_ids:
        values.pop(node_id, None)
    for header, content in zip(imported.values, data, strict=True):
        values[header.node_id] = torch_codec.decode(header.value, data=content, device=device)
