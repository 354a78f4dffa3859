"""Joins what variables are after branches and loops."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from insitu._containers import Variable, variable
from insitu._origin import Origin, latest
from insitu._proxy import Proxy, as_meta, proxies_in, wrap
from insitu._shapes import Unknown
from insitu_wire.errors import Reason, error
from insitu_wire.operations import SELECT

if TYPE_CHECKING:
    from insitu_wire.errors import Location


def is_recordable(value: object) -> bool:
    """Whether a Python variable may hold a value of the session in its place."""
    return isinstance(value, torch.Tensor | bool | int | float)


def kept(value: Proxy) -> Proxy:
    """Gives the value as it is here, though it be a variable that changes later."""
    return variable(value) if isinstance(value, Variable) else value


def make_variable(value: Any) -> Variable:
    """Makes a variable of the session that starts as a value."""
    return variable(value if isinstance(value, torch.Tensor) else torch.tensor(value))


def join(condition: Proxy, one: Any, other: Any, name: str, location: Location) -> Any:
    """Gives the first of two values if a condition holds, else the second.

    Raises:
        InvalidTraceError: UNSUPPORTED_FEATURE for what can not be a value of a session.
    """
    if not (is_recordable(one) and is_recordable(other)):
        raise error(
            Reason.UNSUPPORTED_FEATURE,
            f"{name!r} is {one!r:.40} or {other!r:.40}, and which is known only when the session "
            "runs; use another name, or tensors or numbers in both branches",
            location=location,
        )
    values = [
        part if isinstance(part, torch.Tensor) else torch.tensor(part) for part in (one, other)
    ]
    recorder = condition._origin.recorder
    block = recorder.block
    node_id = block.call(SELECT, (condition, *values), {}, location)
    metas = [as_meta(part) for part in values]
    are_alike = all(isinstance(meta, torch.Tensor) for meta in metas) and (
        metas[0].shape == metas[1].shape and metas[0].dtype == metas[1].dtype
    )
    moment = latest((proxy._origin for proxy in proxies_in((condition, *values))), block.number)
    origin = Origin(recorder, location, name, node_id, moment=moment, scope=recorder.scope)
    joined = wrap(metas[0] if are_alike else Unknown(), origin)
    if any(recorder.is_saved(part) for part in (one, other)):
        joined.save()
    return joined
