"""Whose pass is next: users who share a group get equal parts of it. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


class Turns:
    """The segments that run, and how much of the group each of their users has had.

    The user who has had least is next, and of a user's segments the one whose turn was longest ago.
    One who comes counts as having had as much as the least of those who are there.
    """

    def __init__(self) -> None:
        self._had: dict[str, float] = {}
        # In the order of their turns: the next first.
        self._users: dict[str, str] = {}

    def add(self, key: str, user: str) -> None:
        """Takes in a user's segment."""
        self._had.setdefault(user, min(self._had.values(), default=0.0))
        self._users[key] = user

    def remove(self, key: str) -> None:
        """Takes note that a segment has ended."""
        user = self._users.pop(key)
        if user not in self._users.values():
            del self._had[user]

    def order(self, keys: Iterable[str]) -> list[str]:
        """Sorts segments: the one whose turn is next first."""
        places = {key: place for place, key in enumerate(self._users)}
        return sorted(keys, key=lambda key: (self._had[self._users[key]], places[key]))

    def took(self, key: str) -> None:
        """Takes note that a segment had its turn."""
        self._users[key] = self._users.pop(key)

    def charge(self, key: str, cost: float) -> None:
        """Takes note of what a segment took of the group, in its own turn or another's."""
        self._had[self._users[key]] += cost
