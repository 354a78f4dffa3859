"""Which shard groups there are, and which have room. Pure: clock and ids are arguments."""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, NewType

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

LeaseId = NewType("LeaseId", str)

# What a network and a copy to all ranks carry, about.
_UPLOAD_BYTES_PER_SECOND = 500e6
_MAX_KNOWN_UPLOADS = 4096
# A smaller group is for whoever comes.
_SEVERAL_PLACES = 4


class GroupState(Enum):
    """Says in which state a shard group is; the names of `insitu.v1.ShardGroupState`."""

    READY = "READY"
    BUSY = "BUSY"
    DRAINING = "DRAINING"


@dataclass(slots=True)
class Group:
    """A shard group that holds a lease."""

    lease_id: LeaseId
    group_id: str
    model: str
    address: str
    num_ranks: int
    max_sessions: int
    """How many sessions it takes at once."""
    expires_at: float
    host_id: str = ""
    """The host that started it; empty if none did."""
    handle_bytes: int = 0
    """Memory of each rank for values between steps; 0 for no bound."""
    reserved_bytes: int = 0
    """What of that is kept for sessions that may have values on it."""
    num_sessions_of: Counter[str] = field(default_factory=Counter)
    """How many run on it now, of each user."""
    num_pinned: int = 0
    """How many may have values on it, and come back, until each has been released."""
    expected_seconds: float = 0.0
    """What those are expected to take in all."""
    uploads: OrderedDict[str, None] = field(default_factory=OrderedDict)
    """Content hashes of tensors that it was brought, the last at the end."""
    is_draining: bool = False
    is_suspect: bool = False
    """Whether it did not answer, and has not been heard of since."""
    is_taken: bool = False
    """Whether it runs a session that nothing may run beside."""

    @property
    def num_sessions(self) -> int:
        """How many run on it now."""
        return self.num_sessions_of.total()

    @property
    def is_empty(self) -> bool:
        """Whether it has nothing of any session."""
        return not self.num_pinned and not self.num_sessions

    @property
    def is_open(self) -> bool:
        """Whether it takes in sessions that it has nothing of yet."""
        return not (self.is_draining or self.is_suspect or self.is_taken)

    def has_memory(self, num_bytes: int) -> bool:
        """Whether values of a session find room that may take so much; there is for one, always."""
        left = self.handle_bytes - self.reserved_bytes
        return not (num_bytes and self.handle_bytes and self.reserved_bytes) or num_bytes <= left

    def predicted_seconds(self, uploads: Mapping[str, int]) -> float:
        """Gives how long a session would take to come through here that brings some tensors.

        Args:
            uploads: their bytes, by content hash; those that are here already take no time.
        """
        missing = sum(size for name, size in uploads.items() if name not in self.uploads)
        return self.expected_seconds / self.max_sessions + missing / _UPLOAD_BYTES_PER_SECOND

    def brought(self, content_hashes: Iterable[str]) -> None:
        """Takes note that the group has some tensors, and used them just now."""
        for name in content_hashes:
            self.uploads[name] = None
            self.uploads.move_to_end(name)
        while len(self.uploads) > _MAX_KNOWN_UPLOADS:
            self.uploads.popitem(last=False)

    @property
    def sated_users(self) -> frozenset[str]:
        """Users who have more than twice as many of its places as are free, and so get no more.

        However many sessions users send, a group of four places or more has one for the next user
        (dynamic thresholds: Choudhury and Hahne, IEEE/ACM Transactions on Networking 1998), for its
        last place is for who has none. So a group that is full has a user of one session, who has
        had a quantum after as long as a turn of each user takes: nobody waits longer because
        sessions run beside each other than if they ran one by one.
        """
        free = self.max_sessions - self.num_sessions
        if free == 1 and self.max_sessions >= _SEVERAL_PLACES:
            return frozenset(self.num_sessions_of)
        return frozenset(user for user, count in self.num_sessions_of.items() if count > 2 * free)

    @property
    def state(self) -> GroupState:
        """What the group can do now."""
        if self.is_draining:
            return GroupState.DRAINING
        is_full = self.is_suspect or self.is_taken or self.num_sessions >= self.max_sessions
        return GroupState.BUSY if is_full else GroupState.READY


class Registry:
    """The leases, in the order in which their groups were last given a place back."""

    def __init__(self, *, ttl_seconds: float) -> None:
        self.ttl_seconds = ttl_seconds
        self._groups: dict[LeaseId, Group] = {}

    def grant(
        self,
        lease_id: LeaseId,
        *,
        group_id: str,
        model: str,
        address: str,
        num_ranks: int,
        max_sessions: int,
        now: float,
        host_id: str = "",
        handle_bytes: int = 0,
    ) -> Group:
        """Grants a lease to a group."""
        expires_at = now + self.ttl_seconds
        group = Group(
            lease_id,
            group_id,
            model,
            address,
            num_ranks,
            max_sessions,
            expires_at,
            host_id,
            handle_bytes,
        )
        self._groups[lease_id] = group
        return group

    def keep_alive(self, lease_id: LeaseId, *, now: float, is_draining: bool = False) -> bool:
        """Renews a lease; False if it is not held any more. Draining is for good."""
        group = self._groups.get(lease_id)
        if group is None:
            return False
        group.expires_at = now + self.ttl_seconds
        group.is_draining |= is_draining
        group.is_suspect = False
        return True

    def revoke(self, lease_id: LeaseId) -> Group | None:
        """Takes a lease away; None if it is not held any more."""
        return self._groups.pop(lease_id, None)

    def expire(self, now: float) -> list[Group]:
        """Takes away the leases whose time is over, and gives their groups."""
        late = [group for group in self._groups.values() if group.expires_at <= now]
        for group in late:
            del self._groups[group.lease_id]
        return late

    def holder(self, group_id: str) -> Group | None:
        """Gives the lease that a group of this id holds already."""
        return next((group for group in self if group.group_id == group_id), None)

    def suspect(self, group: Group) -> None:
        """Takes note that a group does not answer: it gets nothing until it renews its lease."""
        group.is_suspect = True

    def pin(self, group: Group, seconds: float, handle_bytes: int = 0) -> None:
        """Takes in a session that will have values on a group.

        Args:
            group: the group.
            seconds: what it is expected to take there.
            handle_bytes: how much of each rank's memory is kept for its values.
        """
        group.num_pinned += 1
        group.expected_seconds += seconds
        group.reserved_bytes += handle_bytes

    def unpin(self, group: Group, seconds: float, handle_bytes: int = 0) -> None:
        """Takes note that a group has nothing of a session any more."""
        group.num_pinned -= 1
        group.reserved_bytes -= handle_bytes
        # Nobody is there: nothing is left of rounding, either.
        group.expected_seconds = group.expected_seconds - seconds if group.num_pinned else 0.0

    def take(self, group: Group, user: str, *, is_alone: bool = False) -> None:
        """Has a user's session run on a group, beside others or alone."""
        group.num_sessions_of[user] += 1
        group.is_taken = is_alone

    def free(self, group: Group, user: str) -> None:
        """Takes note that a session does not run on a group any more."""
        group.is_taken = False
        group.num_sessions_of[user] -= 1
        group.num_sessions_of += Counter()  # forgets users who have none
        if self._groups.pop(group.lease_id, None):
            # A group whose lease is gone stays gone.
            self._groups[group.lease_id] = group

    def find(self, lease_id: str) -> Group | None:
        """Gives the group that holds a lease."""
        return self._groups.get(LeaseId(lease_id))

    def of(self, model: str) -> list[Group]:
        """Gives the groups of a model, the one that was free longest first."""
        return [group for group in self if group.model == model]

    def ready_models(self) -> list[str]:
        """Gives the models of which a group has room, the one with the fewest sessions first."""
        ready = [group for group in self if group.state is GroupState.READY]
        ready.sort(key=lambda group: group.num_sessions)
        return list(dict.fromkeys(group.model for group in ready))

    def replicas(self) -> dict[str, int]:
        """Counts the groups of each model that is served."""
        counts: dict[str, int] = {}
        for group in self:
            counts[group.model] = counts.get(group.model, 0) + 1
        return counts

    def __contains__(self, lease_id: object) -> bool:
        """Whether a lease is held."""
        return lease_id in self._groups

    def __iter__(self) -> Iterator[Group]:
        """Yields the groups."""
        return iter(list(self._groups.values()))
