"""Settings of the client: what code sets, else the environment, else the default."""

from __future__ import annotations

import os

DEFAULT_ENDPOINT = "127.0.0.1:7433"
"""Where `insitu up` listens unless told otherwise."""


class Config:
    """Where the server is and who asks.

    `INSITU_ENDPOINT` and `INSITU_API_KEY` set the same from outside.
    """

    def __init__(self) -> None:
        self._endpoint: str | None = None
        self._api_key: str | None = None

    def set_default_endpoint(self, endpoint: str) -> None:
        """Sets the server's address, such as "127.0.0.1:7433"."""
        self._endpoint = endpoint

    def set_default_api_key(self, api_key: str) -> None:
        """Sets the API key that every call to the server carries."""
        self._api_key = api_key

    @property
    def endpoint(self) -> str:
        """The server's address."""
        return self._endpoint or os.environ.get("INSITU_ENDPOINT") or DEFAULT_ENDPOINT

    @property
    def has_endpoint(self) -> bool:
        """Whether someone chose the server's address."""
        return bool(self._endpoint or os.environ.get("INSITU_ENDPOINT"))

    @property
    def api_key(self) -> str:
        """The API key; empty where none is set."""
        return self._api_key or os.environ.get("INSITU_API_KEY") or ""


CONFIG = Config()
