"""Has modules keep what they were given alone, and run again in the backward pass."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from collections.abc import Set as AbstractSet

    import torch

    from insitu_shard.engine.module import LoadedModule


def checkpoint_modules(
    model: LoadedModule, watched: AbstractSet[str]
) -> Iterator[Callable[[], None]]:
    """Puts a function before the forward of decoder layers; yields what undoes each.

    What is read or written inside of a layer happens once: of such a layer its parts are
    checkpointed in which nothing is.

    Args:
        model: the model.
        watched: paths of the modules at which something is done.
    """
    for block in sorted(model.block_paths):
        for path in _unwatched(model.modules[block], block, watched):
            yield _checkpoint(model.modules[path])


def _unwatched(module: torch.nn.Module, path: str, watched: AbstractSet[str]) -> Iterator[str]:
    children = dict(module.named_children())
    if not children:
        return  # it keeps no more than what it was given
    if not any(at.startswith(f"{path}.") for at in watched):
        yield path
        return
    for name, child in children.items():
        yield from _unwatched(child, f"{path}.{name}", watched)


def _checkpoint(module: torch.nn.Module) -> Callable[[], None]:
    run = module.forward
    is_own = "forward" in module.__dict__

    def forward(*args: Any, **kwargs: Any) -> Any:
        # Keywords go along as they are: checkpoint has some of its own.
        again = partial(run, **kwargs)
        return checkpoint(again, *args, use_reentrant=False, preserve_rng_state=False)

    module.forward = forward

    def undo() -> None:
        if is_own:
            module.forward = run
        else:
            del module.forward

    return undo
