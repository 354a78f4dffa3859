"""Knows which shard group keeps which value beyond its session, and for whom. Pure."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from insitu_scheduler.segments import cut
from insitu_wire.errors import Location, Reason, error
from insitu_wire.steps import all_steps

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from insitu_proto.v1.intervention_pb2 import Node
    from insitu_proto.v1.session_pb2 import Session
    from insitu_scheduler.queue import SessionId
    from insitu_scheduler.registry import LeaseId
    from insitu_scheduler.segments import SegmentRange
    from insitu_wire.errors import Error


@dataclass(frozen=True, slots=True)
class KeptValue:
    """Where a value is kept."""

    model: str
    lease_id: LeaseId
    keeper: SessionId
    """The session that keeps it, or will have when it has ended."""


class KeptValues:
    """The values that groups keep, by handle and user. A user never gets at another's.

    Whoever asks for another's is told that it is another's, and who asks for what nobody has that
    it is not there. That gives nothing away, unlike with an upload, whose hash can be made from
    what one suspects: a handle is a random name that only its maker knows, and says nothing of the
    value.
    """

    def __init__(self) -> None:
        self._values: defaultdict[str, dict[str, KeptValue]] = defaultdict(dict)

    def add(
        self, user: str, session: Session, leases: dict[str, LeaseId], *, keeper: SessionId
    ) -> None:
        """Takes note of what a session is to keep.

        Args:
            user: whose it is.
            session: the session, as it starts.
            leases: the groups that run it, by model.
            keeper: the session's id.
        """
        for segment in cut(session):
            model = segment.model or next(iter(leases))
            for node in _nodes(session, segment):
                if node.HasField("keep"):
                    place = KeptValue(model, leases[model], keeper)
                    self._values[node.keep.handle_id][user] = place

    def groups_of(self, user: str, session: Session) -> dict[str, LeaseId]:
        """Gives the groups that a session needs for what it loads, by model.

        Raises:
            NotFoundError: HANDLE_NOT_FOUND, at the user's line.
            PermissionDeniedError: PERMISSION_DENIED, at the user's line.
            VersionError: UNSUPPORTED_FEATURE, if a value is of another model's group, or if several
                groups of one model have what it loads.
        """
        groups: dict[str, LeaseId] = {}
        for segment in cut(session):
            for node in _nodes(session, segment):
                if not node.HasField("load"):
                    continue
                location = _location(session, node)
                place = self.find(user, node.load.handle_id, location)
                if place is None:
                    raise not_found(node.load.handle_id, location)
                if segment.model and segment.model != place.model:
                    raise _of_another_model(place.model, segment.model, location)
                if groups.setdefault(place.model, place.lease_id) != place.lease_id:
                    raise _of_several_groups(place.model, location)
        return groups

    def keepers(self, user: str, session: Session) -> frozenset[SessionId]:
        """Gives the sessions that keep what a session loads; some may still run."""
        nodes = (node for segment in cut(session) for node in _nodes(session, segment))
        loaded = {node.load.handle_id for node in nodes} & self._values.keys()
        places = (self._values[handle_id].get(user) for handle_id in loaded)
        return frozenset(place.keeper for place in places if place is not None)

    def find(self, user: str, handle_id: str, location: Location | None = None) -> KeptValue | None:
        """Gives where a value is kept; None if nobody keeps it.

        Raises:
            PermissionDeniedError: PERMISSION_DENIED, if others keep it and the user does not.
        """
        owners = self._values.get(handle_id)
        if owners is None:
            return None
        if user not in owners:
            raise _of_another_user(handle_id, location)
        return owners[user]

    def has_any(self, lease_id: LeaseId) -> bool:
        """Whether users keep values with a group."""
        return any(
            place.lease_id == lease_id
            for owners in self._values.values()
            for place in owners.values()
        )

    def forget(self, user: str, handle_id: str) -> None:
        """Takes note that a value is kept no longer."""
        self._remove([(handle_id, user)])

    def lose(self, lease_id: LeaseId) -> None:
        """Takes note that a group is gone, and all that it kept."""
        self._remove(
            [
                (handle_id, user)
                for handle_id, owners in self._values.items()
                for user, place in owners.items()
                if place.lease_id == lease_id
            ]
        )

    def _remove(self, names: Iterable[tuple[str, str]]) -> None:
        for handle_id, user in names:
            if owners := self._values.get(handle_id):
                owners.pop(user, None)
                if not owners:
                    del self._values[handle_id]


def not_found(handle_id: str, location: Location | None = None) -> Error:
    """Makes the error for a handle under which nothing is kept."""
    return error(
        Reason.HANDLE_NOT_FOUND,
        f"there is no kept value under the handle {handle_id:.64}; it was released, or has not "
        "been used for long, or the shard group that had it was lost: keep it again",
        location=location,
        handleId=handle_id[:64],
    )


def _of_another_user(handle_id: str, location: Location | None) -> Error:
    return error(
        Reason.PERMISSION_DENIED,
        f"the value under the handle {handle_id:.64} is another user's; use the API key of the "
        "user who kept it, or keep one of your own",
        location=location,
        handleId=handle_id[:64],
    )


def _of_another_model(owner: str, model: str, location: Location | None) -> Error:
    return error(
        Reason.UNSUPPORTED_FEATURE,
        f"the kept value is with {owner}, and is loaded in a trace of {model}; use it between the "
        "traces first, as with `value = handle.clone()`",
        location=location,
    )


def _of_several_groups(model: str, location: Location | None) -> Error:
    return error(
        Reason.UNSUPPORTED_FEATURE,
        f"the session loads values that several shard groups of {model} keep; load them in "
        "sessions of their own, or make them again in one session",
        location=location,
    )


def _nodes(session: Session, segment: SegmentRange) -> Iterator[Node]:
    for step in all_steps(session.steps[segment.start : segment.stop]):
        yield from step.trace.nodes
        yield from step.compute.nodes


def _location(session: Session, node: Node) -> Location | None:
    if not node.location:
        return None
    at = session.locations[node.location - 1]
    return Location(at.file, at.line, at.source)
