"""Encodes and decodes errors: as an RPC's status, and as what ended a session."""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING, cast

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from insitu_proto.v1 import error_reason_pb2, intervention_pb2
from insitu_wire.errors import Error, Location, Reason, error, exception_type, status_code

if TYPE_CHECKING:
    from google.protobuf.message import Message

DOMAIN = "insitu.dev"


def to_status(err: Error) -> status_pb2.Status:
    """Encodes an error for an RPC's trailers, as google.rpc.Status with ErrorInfo (AIP-193)."""
    metadata = dict(err.metadata)
    if err.location:
        metadata |= {
            "file": err.location.file,
            "line": str(err.location.line),
            "source": err.location.source,
        }
    details = [error_details_pb2.ErrorInfo(reason=err.reason, domain=DOMAIN, metadata=metadata)]
    if err.retry_after_seconds is not None:
        delay = duration_pb2.Duration()
        delay.FromTimedelta(datetime.timedelta(seconds=err.retry_after_seconds))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    code: int = status_code(err.reason).value[0]
    return status_pb2.Status(code=code, message=err.message, details=map(_packed, details))


def from_rpc_error(rpc_error: grpc.Call | grpc.aio.AioRpcError, *, address: str) -> Error:
    """Decodes an RPC's error; `address` is named where the server did not answer itself."""
    status = rpc_status.from_call(cast("grpc.Call", rpc_error))
    for detail in status.details if status is not None else ():
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info) and info.domain == DOMAIN and info.reason in Reason.__members__:
            metadata = dict(info.metadata)
            reason = Reason(info.reason)
            err = exception_type(reason)(
                status.message, reason=reason, location=_pop_location(metadata), metadata=metadata
            )
            err.retry_after_seconds = _retry_after(status)
            return err
    return _from_transport(rpc_error.code(), rpc_error.details() or "", address)


def _packed(detail: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(detail)
    return packed


def _retry_after(status: status_pb2.Status) -> float | None:
    info = error_details_pb2.RetryInfo()
    if any(detail.Unpack(info) for detail in status.details):
        seconds: float = info.retry_delay.ToTimedelta().total_seconds()
        return seconds
    return None


def _pop_location(metadata: dict[str, str]) -> Location | None:
    if "line" not in metadata:
        return None
    file, line, source = (metadata.pop(key, "") for key in ("file", "line", "source"))
    return Location(file, int(line), source)


# CANCELLED without details of ours: a server that is told to stop ends its calls so.
_UNANSWERED = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.CANCELLED,
    }
)


def _from_transport(code: grpc.StatusCode, details: str, address: str) -> Error:
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return error(
            Reason.REQUEST_TOO_LARGE,
            f"the server at {address} does not take a message of this size ({details}); "
            "send fewer or smaller tensors",
            address=address,
        )
    if code in _UNANSWERED:
        return error(
            Reason.SERVER_UNREACHABLE,
            f"no insitu server answers at {address} ({details}); start one with `insitu up`, "
            "or set INSITU_ENDPOINT to the address of one that runs",
            address=address,
        )
    return error(
        Reason.INTERNAL,
        f"the server at {address} answered {code.name}: {details}",
        address=address,
        code=code.name,
    )


def to_failure(err: Error) -> error_reason_pb2.Failure:
    """Encodes an error that ended a session while it ran."""
    failure = error_reason_pb2.Failure(
        reason=error_reason_pb2.ErrorReason.Value(f"ERROR_REASON_{err.reason}"),
        message=err.message,
        metadata=err.metadata,
        trace_number=err.trace_number,
        traceback=err.remote_traceback,
    )
    if err.location:
        failure.location.CopyFrom(
            intervention_pb2.SourceLocation(
                file=err.location.file, line=err.location.line, source=err.location.source
            )
        )
    return failure


def from_failure(failure: error_reason_pb2.Failure) -> Error:
    """Decodes why a session failed."""
    name = error_reason_pb2.ErrorReason.Name(failure.reason).removeprefix("ERROR_REASON_")
    reason = Reason(name) if name in Reason.__members__ else Reason.INTERNAL
    where = failure.location
    return exception_type(reason)(
        failure.message,
        reason=reason,
        metadata=dict(failure.metadata),
        location=Location(where.file, where.line, where.source) if where.line else None,
        trace_number=failure.trace_number,
        remote_traceback=failure.traceback,
    )
