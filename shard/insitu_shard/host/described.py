"""What a host tells of a model that it has not loaded: its structure and its tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from insitu_proto.v1.host_service_pb2 import RegisterHostRequest, TokenizerPart
from insitu_shard.engine import (
    describe,
    load_config,
    parse_dtype,
    resolve_model_folder,
    tokenizer_files,
    tokenizer_hash,
)
from insitu_wire.limits import CHUNK_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator


def described(name: str, path: str, *, dtype: str = "") -> Iterator[RegisterHostRequest]:
    """Yields the messages that describe a model, from its files without the weights.

    Args:
        name: name by which sessions ask for it.
        path: its folder, or a Hugging Face hub id.
        dtype: element type of the weights; by default as stored.
    """
    folder = resolve_model_folder(path)
    config = load_config(folder)
    stored = getattr(config, "dtype", None) or torch.float32
    element_type = parse_dtype(dtype, torch.device("cpu")) if dtype else stored
    files = tokenizer_files(folder)
    hashed = tokenizer_hash(files)
    model = describe(config, name=name, dtype=element_type, tokenizer_hash=hashed)
    yield RegisterHostRequest(model=model)
    for file in files:
        content = file.read_bytes()
        for start in range(0, max(len(content), 1), CHUNK_BYTES):
            data = content[start : start + CHUNK_BYTES]
            part = TokenizerPart(file_name=file.name, data=data)
            yield RegisterHostRequest(tokenizer=part)
