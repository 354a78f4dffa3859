"""Where servers listen, and what they say if they can not."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from insitu_wire.errors import Reason, error

if TYPE_CHECKING:
    from collections.abc import Callable


def endpoint(host: str, port: int) -> str:
    """Writes a host and port as gRPC and URLs take them."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def family(host: str) -> socket.AddressFamily:
    """Gives the kind of address that a host is."""
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def listen(add_port: Callable[[str], int], host: str, port: int, *, what: str, cure: str) -> int:
    """Has a gRPC server listen, and gives its port.

    Args:
        add_port: has the server listen at an address.
        host: where.
        port: the port; 0 for a free one.
        what: what the server can not do without, such as "listen on 127.0.0.1:80".
        cure: the flag that chooses another port, and what else it may be.

    Raises:
        ConfigurationError: INVALID_CONFIGURATION, if the port can not be used.
    """
    try:
        # Tried before by hand: gRPC would log lines of its own and not say why.
        socket.create_server((host, port), family=family(host)).close()
        return add_port(endpoint(host, port))
    except (OSError, RuntimeError) as exception:
        why = exception.strerror if isinstance(exception, OSError) else "taken just now"
        raise error(
            Reason.INVALID_CONFIGURATION,
            f"can not {what} ({why}); choose a free port with {cure}",
            host=host,
            port=port,
        ) from exception
