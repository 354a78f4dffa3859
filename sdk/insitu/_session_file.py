"""Recorded sessions as files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from google.protobuf.message import DecodeError

from insitu_proto.v1.session_file_pb2 import SessionFile
from insitu_wire.errors import Reason, error

if TYPE_CHECKING:
    from os import PathLike

    from insitu_proto.v1.session_pb2 import Session
    from insitu_wire.errors import Error

_FORMAT = SessionFile.DESCRIPTOR.full_name


def write_session(path: str | PathLike[str], session: Session) -> None:
    """Writes a session; the same session gives the same bytes."""
    file = SessionFile(format=_FORMAT, session=session)
    Path(path).write_bytes(file.SerializeToString(deterministic=True))


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
