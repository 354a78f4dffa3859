"""`insitu run`: a session from a file, and what it saved."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch.utils import _pytree as pytree

from insitu._config import CONFIG
from insitu._names import by_name, saves
from insitu._session_file import read_session, take_tensors
from insitu.backends.remote import RemoteBackend
from insitu_wire.errors import Reason, error

if TYPE_CHECKING:
    from pathlib import Path

    from insitu.backends import Backend
    from insitu_proto.v1.session_pb2 import Session

_MAX_SHOWN = 16


def run_file(path: Path, *, remote: bool, output: Path | None) -> None:
    """Runs a session, and shows what it saved, also if it failed after that.

    Args:
        path: the session's file.
        remote: whether it runs on the server instead of in this process.
        output: where saved values are written, if anywhere.

    Raises:
        Error: why it can not be run, or failed.
    """
    session = read_session(path)
    if output is not None and not output.absolute().parent.is_dir():
        raise error(
            Reason.INVALID_CONFIGURATION,
            f"--output {str(output)!r} is in a folder that does not exist; make it first",
            output=output,
        )
    backend: Backend = RemoteBackend(CONFIG) if remote else _local_backend(session)
    names = {node.id: node.save.name for node in saves(session.steps)}
    saved: list[tuple[str, object]] = []
    try:
        for node_id, value in backend.run(session, take_tensors(session)):
            saved.append((names[node_id], value))
    finally:
        backend.close()
        deliver(by_name(saved), output)


def _local_backend(session: Session) -> Backend:
    # Only who runs models in this process needs what a shard needs.
    from insitu.backends.local import LocalBackend

    model = next((step.trace.model for step in session.steps if step.HasField("trace")), None)
    if model is None:
        raise error(
            Reason.MALFORMED_SESSION,
            "the session has no trace, so there is no model to run it on here; use --remote",
        )
    return LocalBackend(model)


def deliver(values: dict[str, Any], output: Path | None) -> None:
    """Shows saved values by name, and writes them to a file if there is to be one."""
    leaves = _leaves(values)
    width = max(map(len, leaves), default=0)
    for name, leaf in leaves.items():
        print(f"{name:{width}}  {_describe(leaf)}")
    if output is not None and leaves:
        _write(leaves, output)
        print(f"written to {output}")


def _leaves(values: dict[str, Any]) -> dict[str, Any]:
    """Takes structures apart: x = (a, b) becomes x[0] and x[1]."""
    return {
        name + pytree.keystr(path): leaf
        for name, value in values.items()
        for path, leaf in pytree.tree_flatten_with_path(value)[0]
    }


def _describe(leaf: object) -> str:
    if not isinstance(leaf, torch.Tensor):
        return repr(leaf)
    shape = f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}"
    return f"{shape}  {' '.join(str(leaf).split())}" if leaf.numel() <= _MAX_SHOWN else shape


def _write(leaves: dict[str, Any], output: Path) -> None:
    """Writes tensors and numbers as tensors, and what else there is as text, in the metadata."""
    tensors: dict[str, torch.Tensor] = {}
    texts: dict[str, str] = {}
    for name, leaf in leaves.items():
        if not isinstance(leaf, torch.Tensor | bool | int | float):
            texts[name] = str(leaf)
            continue
        # A copy: two tensors of one value lie in the same memory, which the format refuses.
        tensor = torch.as_tensor(leaf).clone()
        if tensor.dtype is torch.complex128:  # the format has no such type
            texts[name] = "complex128: the last dimension holds real and imaginary parts"
            tensor = torch.view_as_real(tensor)
        tensors[name] = tensor
    save_file(tensors, output, metadata=texts)
