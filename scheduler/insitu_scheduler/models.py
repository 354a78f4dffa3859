"""What the scheduler knows of the models that are served: their structure and tokenizer."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from insitu_wire.errors import Error, Reason, error

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from insitu_proto.v1.model_pb2 import ModelDescription
    from insitu_scheduler.hosting import Hosting
    from insitu_scheduler.registry import Registry

# A group that died is back by then, or its operator is at work.
_AWAITED_SECONDS = 600.0
_RETRY_SECONDS = 1.0
_MAX_NAMES_IN_MESSAGE = 20


@dataclass(frozen=True, slots=True)
class TokenizerFile:
    """One file of a tokenizer."""

    name: str
    content: bytes


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A model's structure, as its shard group described it."""

    description: ModelDescription
    tokenizer_files: tuple[TokenizerFile, ...]
    module_paths: frozenset[str]
    vocabulary_size: int | None
    """Number of token ids; None where the configuration does not tell."""
    depths: Mapping[str, float]
    """Which part of the decoder layers a pass has run when it is through with a module, by path; of
    modules that are not here, and of models without such layers, that is not known."""

    @classmethod
    def from_description(
        cls, description: ModelDescription, tokenizer_files: tuple[TokenizerFile, ...]
    ) -> KnownModel:
        """Takes out of a description what sessions are checked against."""
        return cls(
            description=description,
            tokenizer_files=tokenizer_files,
            module_paths=frozenset(module.path for module in description.modules),
            vocabulary_size=_vocabulary_size(description.config_json),
            depths=_depths(description),
        )


class ModelCatalog:
    """The models that some group holds, or held until a short while ago, or that a host can load.

    Sessions for a model whose last group has died wait for the next one.
    """

    def __init__(self, registry: Registry, hosting: Hosting) -> None:
        self._registry = registry
        self._hosting = hosting
        self._known: dict[str, KnownModel] = {}
        self._left_at: dict[str, float] = {}
        self._back_by: dict[str, float] = {}

    def await_again(self, names: Iterable[str]) -> None:
        """Takes note of models that were served before this scheduler was started."""
        self._back_by = dict.fromkeys(names, time.monotonic() + _AWAITED_SECONDS)

    def left(self, name: str) -> None:
        """Takes note that a group of a model is gone."""
        self._left_at[name] = time.monotonic()

    def add(self, model: KnownModel) -> None:
        """Learns a model, or what has changed of it."""
        self._known[model.description.name] = model

    def tokenizer_files(self, tokenizer_hash: str) -> tuple[TokenizerFile, ...] | None:
        """Gives the files of a tokenizer that is known already."""
        for model in self._known.values():
            if model.description.tokenizer_hash == tokenizer_hash:
                return model.tokenizer_files
        return None

    def depths(self, name: str) -> Mapping[str, float]:
        """Gives a model's depths, as far as it is known."""
        model = self._known.get(name)
        return model.depths if model else {}

    def served(self) -> Mapping[str, KnownModel]:
        """Gives the models that are served, or will be soon, by name."""
        since = time.monotonic() - _AWAITED_SECONDS
        awaited = {name for name, left_at in self._left_at.items() if left_at > since}
        names = awaited | self._hosting.models | {*self._registry.replicas()}
        return {name: self._known[name] for name in sorted(names)}

    def find(self, name: str) -> KnownModel:
        """Gives a model that is served.

        Raises:
            NotFoundError: MODEL_NOT_FOUND.
        """
        served = self.served()
        self.check_back([name], served)
        if name not in served:
            raise model_not_found(name, served)
        return served[name]

    def check_back(self, names: Iterable[str], served: Mapping[str, KnownModel]) -> None:
        """Has those wait outside who ask for models whose groups have yet to come back.

        Args:
            names: the models that are asked for.
            served: those that are served.

        Raises:
            NotFoundError: MODEL_NOT_FOUND, with a time to try again after.
        """
        now = time.monotonic()
        for name in names:
            if name not in served and now < self._back_by.get(name, 0.0):
                raise error(
                    Reason.MODEL_NOT_FOUND,
                    f"the server was started again, and no shard group of {name!r} is back yet; "
                    "try again",
                    retry_after_seconds=_RETRY_SECONDS,
                    model=name,
                )


def _depths(description: ModelDescription) -> dict[str, float]:
    called = sorted(
        (module for module in description.modules if module.call_order),
        key=lambda module: module.call_order,
    )
    blocks = [module.path for module in called if module.is_block]
    depths: dict[str, float] = {}
    num_run = 0
    for module in called:
        num_run += module.is_block
        holds_blocks = any(path.startswith(f"{module.path}.") for path in blocks)
        if blocks and module.path and not holds_blocks:
            depths[module.path] = num_run / len(blocks)
    return depths


def model_not_found(name: str, served: Mapping[str, object]) -> Error:
    """Makes the error for a model that no group holds."""
    names = ", ".join(list(served)[:_MAX_NAMES_IN_MESSAGE])
    return error(
        Reason.MODEL_NOT_FOUND,
        f"no shard group serves a model named {name[:200]!r}; served are: {names or 'none yet'}",
        model=name[:200],
        served=names,
    )


def _vocabulary_size(config_json: str) -> int | None:
    try:
        config = json.loads(config_json or "{}")
    except json.JSONDecodeError:
        return None
    size = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    return size if isinstance(size, int) else None
