"""Headers of saved values have a checksum of their own: numbers and shapes are in no data."""

from __future__ import annotations

import zlib

from insitu_proto.v1.result_pb2 import SavedValue


def sealed(header: SavedValue) -> SavedValue:
    """Gives a header with its checksum."""
    header.header_crc32 = _checksum(header)
    return header


def is_whole(header: SavedValue) -> bool:
    """Whether a header is as it was sealed; one that never was has no checksum."""
    return not header.header_crc32 or header.header_crc32 == _checksum(header)


def _checksum(header: SavedValue) -> int:
    bare = SavedValue()
    bare.CopyFrom(header)
    bare.ClearField("header_crc32")
    return zlib.crc32(bare.SerializeToString(deterministic=True))
