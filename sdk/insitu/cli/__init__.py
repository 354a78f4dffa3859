"""The `insitu` command."""

from insitu.cli._app import main

__all__ = ["main"]
