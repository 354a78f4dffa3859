"""Lets a session in: checked first, then in the journal, then in the queue."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
import uuid
from contextlib import ExitStack
from typing import TYPE_CHECKING

from insitu_scheduler import events
from insitu_scheduler.auth import check_model
from insitu_scheduler.events import EventLog
from insitu_scheduler.journal import AcceptedSession
from insitu_scheduler.live_session import LiveSession
from insitu_scheduler.queue import SessionId
from insitu_scheduler.refusals import check_limit, malformed
from insitu_scheduler.segments import count_tokens, cut, models_named, models_of
from insitu_scheduler.terms import Terms, clamp
from insitu_scheduler.validation import check_size, validate
from insitu_wire.errors import Error, Reason, error

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import TypeVar

    from insitu_proto.v1.scheduler_service_pb2 import SubmitSessionRequest
    from insitu_proto.v1.session_pb2 import Session
    from insitu_scheduler.dispatch import Dispatcher
    from insitu_scheduler.journal import Journal, KnownRequest
    from insitu_scheduler.keys import Key
    from insitu_scheduler.limits import Limits
    from insitu_scheduler.metrics import SchedulerMetrics
    from insitu_scheduler.models import KnownModel, ModelCatalog
    from insitu_scheduler.uploads import UploadStore

    T = TypeVar("T")

_log = logging.getLogger(__name__)

_MAX_REQUEST_ID = 128
_MAX_DEADLINE_SECONDS = 365 * 24 * 3600
# Work on larger sessions would hold up the event loop.
_MAX_INLINE_BYTES = 256 * 1024


class Admission:
    """Decides on submissions."""

    def __init__(
        self,
        catalog: ModelCatalog,
        journal: Journal,
        dispatcher: Dispatcher,
        uploads: UploadStore,
        metrics: SchedulerMetrics,
        *,
        max_session_bytes: int,
        limits: Limits,
    ) -> None:
        self._catalog = catalog
        self._journal = journal
        self._dispatcher = dispatcher
        self._uploads = uploads
        self._metrics = metrics
        self._max_session_bytes = max_session_bytes
        self._limits = limits

    async def submit(
        self, key: Key, request: SubmitSessionRequest, *, traceparent: str = ""
    ) -> SessionId:
        """Accepts a session, or finds the one that the request id was used for before.

        Raises:
            Error: why it is refused; nothing of it is kept then.
        """
        self._dispatcher.intake.check_accepts()
        _check_request_id(request.request_id)
        session = request.session
        check_size(session, self._max_session_bytes)
        payload, digest = await _off_loop(session, lambda: _encode(session))
        try:
            return await self._take(key, request, payload, digest, traceparent)
        except Error:
            # What was taken once is answered, even if it would be refused by now.
            known = await self._journal.find_request(key.user, request.request_id)
            if known is None:
                raise
            return _same_session(known, digest, request.request_id)

    async def _take(
        self,
        key: Key,
        request: SubmitSessionRequest,
        payload: bytes,
        digest: bytes,
        traceparent: str,
    ) -> SessionId:
        session, user = request.session, key.user
        limits = key.limits.within(self._limits)
        tier, deadline = clamp(request.tier, key.tier), _deadline(request)
        terms = Terms(tier, key.weight, limits, traceparent, deadline)
        models = self._catalog.served()
        self._catalog.check_back(sorted(models_named(session)), models)
        await _off_loop(session, lambda: _check(session, key, terms.limits, models))
        self._dispatcher.hosting.check_together(models_of(session))
        # Refused now where it can be known; it may be lost later, too.
        self._dispatcher.kept.groups_of(user, session)
        accepted = AcceptedSession(
            session_id=SessionId(str(uuid.uuid4())),
            request_id=request.request_id,
            user=user,
            model=cut(session)[0].model,
            payload=payload,
            payload_digest=digest,
            is_detached=request.is_detached,
            terms=terms,
        )
        # What the journal has must be queued, even if the client goes away between the two.
        return await asyncio.shield(asyncio.create_task(self._accept(accepted, session)))

    async def _accept(self, accepted: AcceptedSession, session: Session) -> SessionId:
        with ExitStack() as undo:
            self._uploads.hold(accepted.session_id, accepted.user, session.tensors)
            undo.callback(self._uploads.release, accepted.session_id)
            bound = accepted.terms.limits.max_waiting_sessions
            position = self._dispatcher.intake.reserve(accepted.model, accepted.user, bound)
            log = EventLog(accepted.session_id, accepted.user)
            for event in (events.received(), events.approved(), events.queued(position)):
                log.show(log.stamp(event))
            try:
                known = await self._journal.accept(accepted, log.events)
            finally:
                self._dispatcher.intake.unreserve(accepted.user)
            if known.session_id != accepted.session_id:
                return _same_session(known, accepted.payload_digest, accepted.request_id)
            undo.pop_all()
        kept = self._dispatcher.kept
        live = LiveSession(
            log,
            session,
            accepted.model,
            needed_leases=kept.groups_of(accepted.user, session),
            keepers=kept.keepers(accepted.user, session),
            terms=accepted.terms,
        )
        self._dispatcher.enqueue(live, position=position, is_detached=accepted.is_detached)
        self._metrics.accepted(accepted.model or "")
        _log.info(
            "session %s of %s is accepted", accepted.session_id, accepted.user,
            extra={"session_id": accepted.session_id},
        )  # fmt: skip
        return accepted.session_id


async def _off_loop(session: Session, work: Callable[[], T]) -> T:
    """Does work on a session, on a thread if the session is large."""
    if session.ByteSize() <= _MAX_INLINE_BYTES:
        return work()
    return await asyncio.to_thread(work)


def _check(session: Session, key: Key, limits: Limits, models: Mapping[str, KnownModel]) -> None:
    """Checks what a session is, and that its user may run it."""
    for model in sorted(models_named(session)):
        check_model(model)
    validate(session, {name: model for name, model in models.items() if key.may_use(name)})
    if limits.max_tokens is not None:
        check_limit("tokens", count_tokens(session), int(limits.max_tokens))


def _encode(session: Session) -> tuple[bytes, bytes]:
    payload = session.SerializeToString(deterministic=True)
    return payload, hashlib.sha256(payload).digest()


def _check_request_id(request_id: str) -> None:
    if not 0 < len(request_id) <= _MAX_REQUEST_ID:
        raise error(
            Reason.MALFORMED_SESSION,
            f"the request id has {len(request_id)} characters; it must have 1 to "
            f"{_MAX_REQUEST_ID}, and be new for each session: use a UUID",
            length=len(request_id),
        )


def _deadline(request: SubmitSessionRequest) -> float | None:
    if not request.HasField("deadline"):
        return None
    seconds = request.deadline.seconds + request.deadline.nanos / 1e9
    if not 0 < seconds <= _MAX_DEADLINE_SECONDS:
        raise malformed(
            f"the deadline is {seconds:g} seconds after the session's acceptance; it must be above "
            f"0 and at most {_MAX_DEADLINE_SECONDS:,}, or none",
            deadlineSeconds=str(seconds),
        )
    return time.time() + seconds


def _same_session(known: KnownRequest, digest: bytes, request_id: str) -> SessionId:
    if known.payload_digest != digest:
        raise error(
            Reason.REQUEST_ID_REUSED,
            f"request id {request_id!r} was used before for a different session, "
            f"{known.session_id}; take a new id for each session",
            requestId=request_id,
            sessionId=known.session_id,
        )
    return known.session_id
