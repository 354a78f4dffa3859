"""Settings of the client: what code sets, else the environment, else the default."""

from __future__ import annotations

import os

from insitu_wire.errors import Reason, error

DEFAULT_ENDPOINT = "127.0.0.1:7433"
"""Where `insitu up` listens unless told otherwise."""


TIERS = ("batch", "default", "interactive")
"""What sessions may ask for, the smallest share first."""

_SUBMIT_WAIT_SECONDS = 600.0


class Config:
    """Where the server is and who asks.

    `INSITU_ENDPOINT`, `INSITU_API_KEY`, `INSITU_TLS_CA`, `INSITU_TIER` and
    `INSITU_SUBMIT_WAIT_SECONDS` set the same from outside.
    """

    def __init__(self) -> None:
        self._endpoint: str | None = None
        self._api_key: str | None = None
        self._tls_ca: str | None = None
        self._tier: str | None = None
        self._submit_wait: float | None = None

    def set_default_endpoint(self, endpoint: str) -> None:
        """Sets the server's address, such as "127.0.0.1:7433"."""
        self._endpoint = endpoint

    def set_default_api_key(self, api_key: str) -> None:
        """Sets the API key that every call to the server carries."""
        self._api_key = api_key

    def set_tls_ca(self, ca: str | os.PathLike[str]) -> None:
        """Has the connection encrypted, to a server with a certificate of known roots.

        Args:
            ca: file of the roots, PEM, or "system" for those of the public CAs.
        """
        self._tls_ca = os.fspath(ca)

    @property
    def tls_ca(self) -> str:
        """The file of the roots that the server is known by; empty for no encryption."""
        return self._tls_ca or os.environ.get("INSITU_TLS_CA") or ""

    def set_default_tier(self, tier: str) -> None:
        """Sets which share of the server's time sessions ask for.

        Args:
            tier: "interactive" where somebody waits, "default", or "batch" where nobody does. The
                API key bounds what is given.
        """
        self._tier = _check_tier(tier)

    def set_submit_wait(self, seconds: float) -> None:
        """Sets how long a session waits outside of a server that has no room for it; 0 for not."""
        self._submit_wait = seconds

    @property
    def tier(self) -> str:
        """The tier that sessions ask for; empty where none is set."""
        return self._tier or _check_tier(os.environ.get("INSITU_TIER", ""))

    @property
    def submit_wait_seconds(self) -> float:
        """How long a session waits outside of a server that has no room for it."""
        if self._submit_wait is not None:
            return self._submit_wait
        text = os.environ.get("INSITU_SUBMIT_WAIT_SECONDS", str(_SUBMIT_WAIT_SECONDS))
        try:
            return float(text)
        except ValueError:
            raise error(
                Reason.INVALID_CONFIGURATION,
                f"INSITU_SUBMIT_WAIT_SECONDS is {text!r}; it must be a number of seconds",
            ) from None

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


def _check_tier(tier: str) -> str:
    if tier and tier not in TIERS:
        raise error(
            Reason.INVALID_CONFIGURATION,
            f"the tier is {tier!r}; it must be one of {', '.join(TIERS)}",
            tier=tier,
        )
    return tier


CONFIG = Config()
