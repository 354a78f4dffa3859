"""Where results go that are not to stay on the scheduler's disk: any file system of fsspec."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import fsspec

from insitu_wire.errors import Reason, error

if TYPE_CHECKING:
    from pathlib import Path
    from typing import BinaryIO


class ObjectStore:
    """Files by name under a URL, such as `s3://BUCKET/PREFIX`. Its calls block: use threads."""

    def __init__(self, url: str) -> None:
        """Connects; nothing is read yet.

        Raises:
            ConfigurationError: there is no such kind of store, or what it needs is not installed.
        """
        try:
            self._files, self._root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as exception:
            raise error(
                Reason.INVALID_CONFIGURATION,
                f"--results is {url!r}, which can not be used ({exception}); give "
                "s3://BUCKET/PREFIX (pip install s3fs), file:///FOLDER, or another URL of fsspec",
                results=url,
            ) from exception

    def put(self, name: str, path: Path) -> None:
        """Stores a local file under a name; it is there whole, or not at all."""
        target = self._path(name)
        self._files.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
        self._files.put_file(str(path), target)

    def open(self, name: str) -> BinaryIO | None:
        """Opens what is under a name; None if nothing is."""
        try:
            return cast("BinaryIO", self._files.open(self._path(name), "rb"))
        except FileNotFoundError:
            return None

    def delete(self, name: str) -> None:
        """Deletes what is under a name, if anything is."""
        if self._files.exists(self._path(name)):
            self._files.rm(self._path(name), recursive=True)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"
