"""Finds the line of the user's own code that is running, and what it calls its value."""

from __future__ import annotations

import linecache
import re
import sys
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import insitu_wire
from insitu_wire.errors import Location

if TYPE_CHECKING:
    from types import FrameType

_OURS = tuple(
    str(Path(folder).resolve().parent) + "/"
    for folder in (__file__, insitu_wire.__file__, torch.__file__)
)
_ASSIGNMENT = re.compile(r"^(?P<name>[^\W\d]\w*)\s*(?::[^=]+)?=(?!=)")


def user_location() -> Location:
    """Gives the innermost running line that is neither insitu's nor torch's."""
    frame = user_frame()
    return _location(frame.f_code.co_filename, frame.f_lineno)


def user_frame() -> FrameType:
    """Gives the innermost running frame that is neither insitu's nor torch's."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OURS):
        frame = frame.f_back
    return frame


@lru_cache(maxsize=4096)
def _location(file: str, line: int) -> Location:
    return Location(file, line, linecache.getline(file, line).strip())


def assigned_name(location: Location) -> str:
    """Gives the variable that the line assigns to; empty if it assigns to none."""
    match = _ASSIGNMENT.match(location.source)
    return match["name"] if match else ""
