"""A torch module of the user's own, to be traced as a language model is."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from torch.utils import _pytree as pytree

from insitu._base_model import BaseModel
from insitu._proxy import as_meta
from insitu._session import Session, active_session
from insitu._shapes import Unknown, structure
from insitu._source import user_location
from insitu._structure import ModuleTree
from insitu_wire.errors import Reason, error

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from insitu._block_recorder import BlockRecorder
    from insitu._trace import Tracer
    from insitu.backends.module import ModuleBackend
    from insitu_wire.errors import Location


class _Arguments(NamedTuple):
    """What a trace calls the module with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Model(BaseModel):
    """Any torch module, to be traced in this process.

        model = insitu.Model(net)
        with model.trace(x):
            hidden = model.layer1.output.save()

    It runs as it is: in training mode or not, on the device of its weights. So that shapes are
    known while a trace is recorded, its forward runs once more, on tensors without elements, for
    every new combination of shapes; where that fails shapes are unknown, and all else is the same.

    Args:
        module: the module.
        rename: see `LanguageModel`.
    """

    def __init__(self, module: torch.nn.Module, *, rename: Mapping[str, str] | None = None) -> None:
        super().__init__(f"{type(module).__name__} at {id(module):#x}", rename)
        self.__dict__.update(_module=module, _trees={})

    _module: torch.nn.Module
    _trees: dict[object, ModuleTree]

    def session(self, *, remote: bool = False, run: bool = True) -> Session:
        """Opens a session that holds traces of this model, and of others in this process.

        Args:
            remote: no server has a module of yours: only False will do.
            run: whether it runs at all.
        """
        if remote:
            raise self._not_remote()
        return Session(self, self._local, run=run)

    def trace(self, *args: Any, remote: bool = False, seed: int = 0, **kwargs: Any) -> Tracer:
        """Opens a trace: one call of the module, with interventions.

        Args:
            *args: what its forward is called with: tensors, numbers, text, None, and tuples, lists
                and dicts of these; also values of the session.
            remote: no server has a module of yours: only False will do.
            seed: of the random numbers that the block draws, from 1; by default one that torch's
                own generator gives. What the module draws itself comes from that generator.
            **kwargs: as `args`, by name.
        """
        session = active_session()
        if remote or (session is not None and session.is_remote):
            raise self._not_remote()
        given = _Arguments(args, kwargs) if args or kwargs else None
        return self._open_trace(given, self.session() if session is None else None, seed)

    def scan(self, *args: Any, **kwargs: Any) -> Tracer:
        """Opens a trace that is recorded and checked, and does not run: for shapes."""
        return self._open_trace(_Arguments(args, kwargs), Session(self, self._local, run=False), 0)

    @cached_property
    def _local(self) -> ModuleBackend:
        # Only who runs models in this process needs what a shard needs.
        from insitu.backends.module import ModuleBackend

        return ModuleBackend(self._module, self.name)

    @property
    def _backend(self) -> ModuleBackend:
        return self._local

    def _add_input(self, block: BlockRecorder, given: Any, location: Location) -> int:
        assert block.trace is not None
        if block.trace.invokes:
            raise error(
                Reason.UNSUPPORTED_FEATURE,
                f"a trace of {self.name} has one input, for only its user knows what a row of it "
                "is; put what is to run together into one batch",
                location=location,
            )
        args, kwargs = given if isinstance(given, _Arguments) else _Arguments((given,), {})
        block.tree = self._tree_for("", as_meta(args), as_meta(kwargs))
        # Sizes are those of this input, however many rows it has.
        block.num_rows = block.length = 1
        return block.add_module_invoke(args, kwargs, location)

    def _applied(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return structure(self._tree_for(path, args, kwargs)[""].output, 1, 1)

    def _tree_for(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ModuleTree:
        """Gives the modules from a path on, as arguments of these shapes go through them."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        modes = tuple(module.training for module in self._module.modules())
        key = (path, modes, repr(spec), *map(_cache_key, leaves))
        if key not in self._trees:
            is_known = not any(isinstance(leaf, Unknown) for leaf in leaves)
            arguments = (args, kwargs) if is_known else None
            description, moments = self._local.describe_for(path, arguments)
            self._trees[key] = ModuleTree(description, self._rename if not path else None, moments)
        return self._trees[key]

    def _not_remote(self) -> Exception:
        return error(
            Reason.UNSUPPORTED_FEATURE,
            f"{self.name} is a module of this process, and no server has it; trace it without "
            "remote=True, or trace a LanguageModel that the server has",
            location=user_location(),
        )


def _cache_key(leaf: Any) -> object:
    if hasattr(leaf, "stride"):
        return tuple(leaf.shape), leaf.stride(), leaf.dtype
    return type(leaf), repr(leaf)
