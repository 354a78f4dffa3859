"""The scheduler's folder: who uses it, where it is reached, where its parts are."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import time
from typing import TYPE_CHECKING

from insitu_wire.errors import Error, Reason, error

if TYPE_CHECKING:
    from pathlib import Path

_HANDOVER_SECONDS = 30.0


class DataDir:
    """A folder that one scheduler at a time uses."""

    def __init__(self, path: Path) -> None:
        """Makes the folder if it is missing, and takes it.

        Raises:
            ConfigurationError: it can not be written, or another scheduler uses it.
        """
        self._path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(path / "scheduler.lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as exception:
            raise _unusable(path, f"can not be written ({exception.strerror})") from exception
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise _unusable(path, "is in use by another scheduler") from None

    @classmethod
    async def once_free(cls, path: Path) -> DataDir:
        """Takes the folder, waiting a while for a scheduler that has lost the lead to go.

        Raises:
            ConfigurationError: as the constructor.
        """
        deadline = time.monotonic() + _HANDOVER_SECONDS
        while True:
            try:
                return cls(path)
            except Error:
                if time.monotonic() > deadline:
                    raise
            await asyncio.sleep(0.1)

    @property
    def journal_url(self) -> str:
        """Where the journal is if no other place is given."""
        return f"sqlite:///{self._path / 'journal.sqlite'}"

    @property
    def results_path(self) -> Path:
        """The folder of results."""
        return self._path / "results"

    @property
    def uploads_path(self) -> Path:
        """The folder of uploads."""
        return self._path / "uploads"

    @property
    def _address_path(self) -> Path:
        return self._path / "scheduler.json"

    def publish(self, address: str, metrics_address: str | None) -> None:
        """Tells other programs of this machine where the scheduler is reached."""
        text = json.dumps({"address": address, "metrics_address": metrics_address})
        draft = self._address_path.with_suffix(".json.new")
        draft.write_text(text)
        draft.replace(self._address_path)

    def close(self) -> None:
        """Gives the folder back."""
        self._address_path.unlink(missing_ok=True)
        os.close(self._lock)


def _unusable(path: Path, problem: str) -> Error:
    return error(
        Reason.INVALID_CONFIGURATION,
        f"the data folder {path} {problem}; choose another with --data-dir",
        dataDir=path,
    )
