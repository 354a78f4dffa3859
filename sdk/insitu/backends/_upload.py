"""Brings the user's large tensors to a server: each once, by the hash of its content."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from insitu_proto.v1 import scheduler_service_pb2
from insitu_wire.content_hash import content_hash
from insitu_wire.dtypes import num_bytes
from insitu_wire.errors import Reason, error
from insitu_wire.limits import CHUNK_BYTES, MAX_UPLOAD_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Never

    import torch

    from insitu_proto.v1.scheduler_service_pb2_grpc import SchedulerServiceStub
    from insitu_proto.v1.session_pb2 import Session
    from insitu_proto.v1.tensor_pb2 import Tensor


def name_contents(session: Session, tensors: Mapping[int, torch.Tensor]) -> None:
    """Gives the tensors that are not inside a session their content hashes.

    Args:
        session: the session.
        tensors: these tensors, by their place in the session's list.

    Raises:
        CapacityError: REQUEST_TOO_LARGE for one that no server takes.
    """
    for index, tensor in tensors.items():
        spec = session.tensors[index]
        if num_bytes(spec) > MAX_UPLOAD_BYTES:
            raise error(
                Reason.REQUEST_TOO_LARGE,
                f"a tensor of shape {list(spec.shape)} has {num_bytes(spec):,} bytes and a server "
                f"takes at most {MAX_UPLOAD_BYTES:,}; bring it in parts, or in a smaller element "
                "type",
                numBytes=num_bytes(spec),
                maxBytes=MAX_UPLOAD_BYTES,
            )
        spec.content_hash = content_hash(spec, _elements(tensor))


def upload_missing(
    stub: SchedulerServiceStub,
    metadata: tuple[tuple[str, str], ...],
    session: Session,
    tensors: Mapping[int, torch.Tensor],
) -> None:
    """Uploads those of a session's tensors that the server asks for, under a progress bar."""
    named = {session.tensors[index].content_hash: index for index in tensors}
    asked = scheduler_service_pb2.FindMissingUploadsRequest(content_hashes=list(named))
    missing = [
        named[name] for name in stub.FindMissingUploads(asked, metadata=metadata).content_hashes
    ]
    total = sum(num_bytes(session.tensors[index]) for index in missing)
    with tqdm(total=total, unit="B", unit_scale=True, desc="Uploading tensors") as progress:
        for index in missing:
            requests = _requests(session.tensors[index], _elements(tensors[index]), progress)
            stub.UploadTensor(requests, metadata=metadata)


def _elements(tensor: torch.Tensor) -> memoryview:
    # With torch, which takes seconds to import: commands that bring no tensor do without it.
    from insitu_wire.torch_codec import tensor_data

    return tensor_data(tensor)


def _requests(
    spec: Tensor, data: memoryview, progress: tqdm[Never]
) -> Iterator[scheduler_service_pb2.UploadTensorRequest]:
    yield scheduler_service_pb2.UploadTensorRequest(tensor=spec)
    for start in range(0, len(data), CHUNK_BYTES):
        chunk = bytes(data[start : start + CHUNK_BYTES])
        yield scheduler_service_pb2.UploadTensorRequest(data=chunk)
        progress.update(len(chunk))
