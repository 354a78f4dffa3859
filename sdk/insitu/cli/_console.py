"""Where the commands print their tables."""

from __future__ import annotations

import sys

from rich.console import Console

_NO_LIMIT = 10_000


def console() -> Console:
    """Gives a console as wide as the terminal; of no width where a program reads what is printed.

    A pipe or a file has no width of its own, and rich would cut names there after 80 characters.
    """
    return Console(width=None if sys.stdout.isatty() else _NO_LIMIT)
