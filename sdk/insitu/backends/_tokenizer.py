"""Keeps tokenizers that servers gave, by their content."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from insitu_wire.errors import Reason, error
from insitu_wire.paths import cache_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from insitu_proto.v1 import model_pb2, scheduler_service_pb2

_PLAIN_NAME = re.compile(r"[\w-][\w.-]*")


def cached_tokenizer(
    description: model_pb2.ModelDescription,
    fetch: Callable[[], Iterable[scheduler_service_pb2.DownloadTokenizerResponse]],
) -> Path:
    """Gives the folder of a model's tokenizer files; fetches them if they are not cached.

    Raises:
        InternalError: the server sends what can not be a tokenizer.
    """
    if not re.fullmatch(r"[0-9a-f]{64}", description.tokenizer_hash):
        raise _refused(description, f"its hash is {description.tokenizer_hash!r:.80}")
    folder = cache_folder() / "tokenizers" / description.tokenizer_hash
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix="partial-"))
    (partial / "config.json").write_text(description.config_json)
    for part in fetch():
        if not _PLAIN_NAME.fullmatch(part.file_name):
            raise _refused(description, f"a file is called {part.file_name!r:.80}")
        with (partial / part.file_name).open("ab") as file:
            file.write(part.data)
    try:
        partial.rename(folder)
    except OSError:
        # Another process was faster; what it has is the same.
        if not folder.is_dir():
            raise
    return folder


def _refused(description: model_pb2.ModelDescription, why: str) -> Exception:
    return error(
        Reason.INTERNAL,
        f"the server's tokenizer of {description.name} is refused: {why}; give token ids instead "
        "of text",
        model=description.name,
    )
