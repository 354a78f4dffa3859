"""The status page: models, queues and groups, and one's own sessions with a key.

Where keys are given out, models are shown to those with a key that is for them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import parse_qs

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.responses import HTMLResponse

from insitu_scheduler.registry import GroupState
from insitu_wire.errors import Error
from insitu_wire.limits import API_KEY_METADATA

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starlette.requests import Request
    from starlette.responses import Response

    from insitu_proto.v1.event_pb2 import Event
    from insitu_scheduler.auth import Authenticator
    from insitu_scheduler.events import EventBook
    from insitu_scheduler.journal import SessionRow
    from insitu_scheduler.keys import Key
    from insitu_scheduler.models import ModelCatalog
    from insitu_scheduler.observing import Observer
    from insitu_scheduler.registry import Group, Registry

_NUM_SESSIONS = 50
_MAX_FORM_BYTES = 4096
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True, slots=True)
class ModelRow:
    """A model and its queue, as the page shows them."""

    name: str
    state: str
    num_groups: int
    num_running: int
    num_waiting: int
    expected_wait: str


@dataclass(frozen=True, slots=True)
class OwnSession:
    """A session of the user's, as the page shows it."""

    session_id: str
    model: str
    state: str
    submitted_at: str
    progress: str
    done: int
    """Traces that have begun."""
    total: int
    """Traces in all; 0 if that is not known yet."""


class StatusPage:
    """Two ways to one page. It is whole HTML, and needs no JavaScript."""

    def __init__(
        self,
        *,
        authenticator: Authenticator,
        book: EventBook,
        catalog: ModelCatalog,
        registry: Registry,
        observer: Observer,
        version: str,
        is_open: bool,
    ) -> None:
        """Makes it.

        Args:
            authenticator: tells whose a key is.
            book: the sessions.
            catalog: the models.
            registry: the groups.
            observer: knows the queues.
            version: of the scheduler.
            is_open: whether models are shown to those without a key, too.
        """
        self._authenticator = authenticator
        self._book = book
        self._catalog = catalog
        self._registry = registry
        self._observer = observer
        self._version = version
        self._is_open = is_open
        templates = Environment(
            loader=PackageLoader("insitu_scheduler.web"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._template = templates.get_template("status.html")

    async def show(self, request: Request) -> Response:
        """Shows what everybody may see."""
        return self._page(200)

    async def show_sessions(self, request: Request) -> Response:
        """Shows that and the sessions of the user whose key the form holds."""
        try:
            key = self._authenticator.check(
                ((API_KEY_METADATA, await _key_of(request)),), _peer(request)
            )
        except Error as err:
            return self._page(401, problem=err.message)
        except ValueError as exception:
            return self._page(400, problem=str(exception))
        rows = await self._book.list_sessions(key.user, limit=_NUM_SESSIONS, after=None)
        sessions = [
            _own_session(row, (await self._book.find(row.session_id)).state) for row in rows
        ]
        return self._page(200, key=key, sessions=sessions)

    def _page(
        self,
        status: int,
        *,
        key: Key | None = None,
        sessions: Sequence[OwnSession] | None = None,
        problem: str = "",
    ) -> Response:
        models = [
            name
            for name in self._catalog.served()
            if (self._is_open if key is None else key.may_use(name))
        ]
        groups = [group for group in self._registry if group.model in models]
        page = self._template.render(
            version=self._version,
            wants_key=key is None and not self._is_open,
            models=[self._model_row(name) for name in models],
            groups=sorted(groups, key=lambda group: (group.model, group.group_id)),
            sessions=sessions,
            num_sessions=_NUM_SESSIONS,
            problem=problem,
        )
        return HTMLResponse(page, status, headers=_HEADERS)

    def _model_row(self, name: str) -> ModelRow:
        groups = [group for group in self._registry if group.model == name]
        state = self._observer.state(name)
        return ModelRow(
            name=name,
            state=_state_of(groups),
            num_groups=len(groups),
            num_running=state.num_running,
            num_waiting=state.num_waiting,
            expected_wait=_duration(state.expected_wait_seconds),
        )


async def _key_of(request: Request) -> str:
    """Takes the key out of the form; it is in the body, so that no log of addresses has it.

    Raises:
        ValueError: there is none.
    """
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > _MAX_FORM_BYTES:
            raise ValueError("the form is too large for an API key; paste the key alone")
    keys = parse_qs(body.decode("utf-8", "replace")).get("api_key", [""])
    if not (key := keys[0].strip()):
        raise ValueError("the form holds no API key; paste yours into the field")
    return key


def _peer(request: Request) -> str:
    """Says where a request comes from, as gRPC would: wrong keys count together."""
    return f"ipv4:{request.client.host}:{request.client.port}" if request.client else ""


def _state_of(groups: Sequence[Group]) -> str:
    states = {group.state for group in groups}
    order = (GroupState.READY, GroupState.BUSY, GroupState.DRAINING)
    first = next((state for state in order if state in states), None)
    return first.value.lower() if first else "no group"


def _own_session(row: SessionRow, newest: Event) -> OwnSession:
    return OwnSession(
        session_id=row.session_id,
        model=row.model or "",
        state=row.state.lower(),
        submitted_at=f"{row.created_at:%Y-%m-%d %H:%M:%S}",
        progress=newest.message,
        done=newest.trace_number,
        total=newest.num_traces,
    )


def _duration(seconds: float) -> str:
    if math.isinf(seconds):
        return "until a group serves it"
    if seconds < 1:
        return "none" if seconds == 0 else "under 1 s"
    if seconds < 120:
        return f"about {seconds:.0f} s"
    return f"about {seconds / 60:.0f} min"
