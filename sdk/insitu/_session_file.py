"""Recorded sessions as files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from google.protobuf.message import DecodeError

from insitu_proto.v1.session_file_pb2 import SessionFile
from insitu_wire.errors import Reason, error
from insitu_wire.limits import MIN_UPLOAD_BYTES
from insitu_wire.torch_codec import tensor_data, tensor_from_data

if TYPE_CHECKING:
    from collections.abc import Mapping
    from os import PathLike

    import torch

    from insitu_proto.v1.session_pb2 import Session
    from insitu_wire.errors import Error

# protobuf's own limit, less room for the envelope.
_MAX_BYTES = 2**31 - 1024
_FORMAT = SessionFile.DESCRIPTOR.full_name


def write_session(
    path: str | PathLike[str], session: Session, tensors: Mapping[int, torch.Tensor]
) -> None:
    """Writes a session; the same session gives the same bytes.

    Args:
        path: the file.
        session: what was recorded.
        tensors: those of its list whose elements are not inside it, by their place; in the file
            they are.

    Raises:
        CapacityError: REQUEST_TOO_LARGE if its tensors do not fit into one file.
    """
    file = SessionFile(format=_FORMAT, session=session)
    size = file.ByteSize() + sum(tensor.nbytes for tensor in tensors.values())
    if size > _MAX_BYTES:
        raise error(
            Reason.REQUEST_TOO_LARGE,
            f"the session takes {size:,} bytes with its tensors, and a file holds at most "
            f"{_MAX_BYTES:,}; run it instead, or bring smaller tensors",
            numBytes=size,
            maxBytes=_MAX_BYTES,
        )
    for index, tensor in tensors.items():
        file.session.tensors[index].data = bytes(tensor_data(tensor))
    Path(path).write_bytes(file.SerializeToString(deterministic=True))


def take_tensors(session: Session) -> dict[int, torch.Tensor]:
    """Takes the large tensors out of a session that was read, as they are not to be sent inside it.

    Returns:
        The tensors, by their place in the session's list.
    """
    taken = {}
    for index, spec in enumerate(session.tensors):
        if len(spec.data) >= MIN_UPLOAD_BYTES:
            taken[index] = tensor_from_data(spec, bytearray(spec.data))
            spec.ClearField("data")
    return taken


def read_session(path: str | PathLike[str]) -> Session:
    """Reads what `write_session` wrote.

    Raises:
        ConfigurationError: the file can not be read, or is of another kind.
    """
    try:
        file = SessionFile.FromString(Path(path).read_bytes())
    except OSError as exception:
        raise _refused(path, f"can not be read ({exception.strerror})") from exception
    except DecodeError as exception:
        raise _refused(path, "is no session of insitu, or is damaged") from exception
    if file.format != _FORMAT:
        raise _refused(path, "is no session of insitu")
    return file.session


def _refused(path: str | PathLike[str], problem: str) -> Error:
    return error(
        Reason.INVALID_CONFIGURATION,
        f"the file {str(path)!r} {problem}; give one that session.save(path) wrote",
        path=path,
    )
