"""Handles: values that stay where the model runs, from one session to the next."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, cast

from insitu._origin import Moment, Origin
from insitu._proxy import Proxy
from insitu._session import Session, active_session
from insitu._source import user_location
from insitu_wire.errors import Reason, error

if TYPE_CHECKING:
    from insitu._base_model import BaseModel
    from insitu._block_recorder import BlockRecorder
    from insitu.backends import Backend


class Handle(Proxy):
    """A value that stays where the model runs, for later sessions of the same user.

    It is used like any value of a session. Each use gets a copy: nothing that is written to it
    changes what is kept.
    """

    id: str
    """Its name: whoever has the same API key may use it."""
    _made: Origin
    _model: BaseModel
    _backend: Backend
    _is_remote: bool
    _was_released: bool

    @property
    def _origin(self) -> Origin:
        """Where the value comes from in the session that is open now."""
        session = active_session()
        if session is None or session._recorder is self._made.recorder:
            return self._made
        return self._loaded(session)

    @_origin.setter
    def _origin(self, origin: Origin) -> None:
        self._made = origin

    def release(self) -> None:
        """Lets the value go now. What uses the handle later is refused.

        Raises:
            PermissionDeniedError: the API key is not of the user who kept it.
        """
        if not self._was_released:
            self._backend.release_handle(self.id)
            self._was_released = True

    def _loaded(self, session: Session) -> Origin:
        recorder = session._recorder
        known = recorder.loaded.get(self.id)
        if known is not None and known.scope == recorder.scope[: len(known.scope)]:
            return known
        location = user_location()
        self._check_place(session)
        block = self._block(session)
        node_id = block.load(self.id, location)
        moment = Moment(block.number)
        description = f"the kept {self._made.description}"
        origin = Origin(
            recorder, location, description, node_id, moment=moment, scope=recorder.scope
        )
        recorder.loaded[self.id] = origin
        return origin

    def _check_place(self, session: Session) -> None:
        if session.is_remote != self._is_remote:
            where = ("in this process", "on a server")
            raise error(
                Reason.UNKNOWN_REFERENCE,
                f"{self._made} is kept {where[self._is_remote]}, and this session runs "
                f"{where[session.is_remote]}; use it where it is, or save it and use the tensor",
                location=user_location(),
            )

    def _block(self, session: Session) -> BlockRecorder:
        """Gives where the value is loaded: the open trace, if its model keeps it."""
        recorder = session._recorder
        trace = recorder.trace
        if trace is None:
            session.add_model(self._model)
            return recorder.compute_on(self._model.name)
        if trace.trace is not None and trace.trace.model != self._model.name:
            raise error(
                Reason.UNSUPPORTED_FEATURE,
                f"{self._made} is kept with {self._model.name}, and this trace runs "
                f"{trace.trace.model}; use it before the trace, as with `value = handle.clone()`",
                location=user_location(),
            )
        return trace


def keep(value: Proxy) -> Handle:
    """Keeps a value of the open session beyond it."""
    session = active_session()
    origin = value._origin
    if session is None or session._recorder is not origin.recorder:
        raise error(
            Reason.VALUE_NOT_AVAILABLE,
            f"{origin} can be kept only inside its session: call .keep() in the block",
            location=user_location(),
        )
    recorder = session._recorder
    block = recorder.trace or recorder.compute_on(session.model.name)
    model = session.model_named(block.trace.model if block.trace else session.model.name)
    handle_id = uuid.uuid4().hex
    block.keep(value, handle_id, user_location())
    handle = cast("Handle", Proxy.make(origin, value._meta, Handle))
    handle.id = handle_id
    handle._model = model
    handle._backend = session.backend
    handle._is_remote = session.is_remote
    handle._was_released = False
    return handle
