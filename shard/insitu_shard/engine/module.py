"""Any torch module as the engine runs it; a language model is one, too (`model.py`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from insitu_proto.v1 import model_pb2
from insitu_shard.compiler import Outline
from insitu_shard.engine.devices import brought, sent_back
from insitu_shard.engine.inputs import ForwardInputs
from insitu_shard.engine.layout import Layouts
from insitu_shard.engine.memory import StorageKey, copied, storages
from insitu_shard.engine.pass_memory import PassMemory
from insitu_shard.engine.ranks import Ranks
from insitu_wire.errors import Reason, error

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from insitu_shard.engine.graph import Invoke
    from insitu_shard.engine.inputs import Batch, Rows


@dataclass(frozen=True, kw_only=True)
class LoadedModule:
    """A module in this process's memory, ready to run."""

    name: str
    module: torch.nn.Module
    device: torch.device
    layouts: Layouts = field(default_factory=Layouts)
    ranks: Ranks = field(default_factory=Ranks)
    pass_memory: PassMemory = field(default_factory=PassMemory)
    is_spread: bool = False
    """Whether modules may be on other devices than its own, where sessions compute."""

    @cached_property
    def modules(self) -> Mapping[str, torch.nn.Module]:
        """All modules by path."""
        return dict(self.module.named_modules())

    @cached_property
    def storages(self) -> frozenset[StorageKey]:
        """The memory of its weights and buffers, which no session may write to."""
        return storages([*self.module.parameters(), *self.module.buffers()])

    def brought(self, value: Any) -> Any:
        """Gives a value of any module on the device where sessions compute."""
        return brought(value, self.device) if self.is_spread else value

    def sent_back(self, written: Any, original: Any) -> Any:
        """Gives a value for a module where the one that it replaces was."""
        return sent_back(written, original) if self.is_spread else written

    @property
    def block_paths(self) -> frozenset[str]:
        """Paths of the decoder layers."""
        return frozenset()

    @property
    def writes_in_place(self) -> bool:
        """Whether its forward pass may write into tensors that a module has taken or returned."""
        return True

    def structure(self, path: str, *, is_input: bool) -> model_pb2.StructureSpec:
        """Gives what is known of the tensors at a module boundary.

        For inputs, a pair of the positional and the keyword arguments.
        """
        del path, is_input
        return model_pb2.StructureSpec()

    @cached_property
    def outline(self) -> Outline:
        """Where its modules are in a forward pass; without blocks if rows can not fork."""
        return Outline()

    def batch(self, invokes: Sequence[Invoke]) -> Batch | None:
        """Puts the rows of all invokes into one batch; None for a module that takes no rows."""
        del invokes
        return None

    @property
    def state_bytes(self) -> int:
        """Estimate of the bytes that stay of each token while a trace generates."""
        return 0

    def inputs_of_rows(self, rows: Rows) -> ForwardInputs:
        """Gives what the forward pass over rows of token ids is called with."""
        raise TypeError(f"{self.name} takes no rows of token ids: {len(rows)}")

    def forward_inputs(self, invokes: Sequence[Invoke]) -> ForwardInputs:
        """Gives what the forward pass of a trace is called with.

        Args:
            invokes: the trace's, with values in the place of references.

        Raises:
            Error: MALFORMED_SESSION for invokes that the model can not take.
        """
        if len(invokes) != 1 or invokes[0].rows or invokes[0].token_ids is not None:
            raise error(
                Reason.MALFORMED_SESSION,
                f"{self.name} takes the arguments of its forward, once a trace; put what is to run "
                "together into one batch",
            )
        # Its forward may write into them.
        args: Any = copied(invokes[0].args)
        kwargs: Any = copied(invokes[0].kwargs)
        return ForwardInputs(args, kwargs)

    def check_arguments(self, path: str, arguments: tuple[Any, Any]) -> None:
        """Refuses arguments of a module that a node has written and that would not show as wrong.

        Raises:
            Error: MALFORMED_SESSION.
        """
