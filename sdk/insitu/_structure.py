"""The module tree of a model, as its description tells it."""

from __future__ import annotations

import difflib
from collections import defaultdict
from typing import TYPE_CHECKING

from insitu_wire.errors import Reason, error

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from insitu_proto.v1 import model_pb2
    from insitu_wire.errors import Location

    Moment = tuple[str, bool, int]
    """Module path, whether its call begins or else ends, and which call of it this is, from 0."""

RESIDUAL = {"resid_pre": "input", "resid_post": "output"}
"""Names that every decoder layer gives the hidden state before and after it."""
_WHY = {
    "heads": "; heads are shown where transformers lets the kernel of an attention be chosen, and "
    "of this module it does not; read its projections",
    "resid_mid": "; it is there in blocks whose MLP takes the sum of resid_pre and what attention "
    "returns",
}
# The other common names are the model's.
_IN_BLOCK = {"attn", "mlp"}


class ModuleTree:
    """The modules of a model by path, and who is whose child."""

    def __init__(
        self,
        description: model_pb2.ModelDescription,
        rename: Mapping[str, str] | None = None,
        moments: Sequence[Moment] = (),
    ) -> None:
        """Makes the tree.

        Args:
            description: the model's.
            rename: further names: of a module, by its full path, at the root; or of every module
                that has a name, beside it.
            moments: what a forward pass enters and leaves, in order; by default the first calls,
                as the description has them.

        Raises:
            ConfigurationError: INVALID_CONFIGURATION for a name that a module has already.
        """
        self._modules = {module.path: module for module in description.modules}
        self._children: dict[str, list[str]] = defaultdict(list)
        for path in self._modules:
            if path:
                parent, _, name = path.rpartition(".")
                self._children[parent].append(name)
        self._model = description.name
        self._aliases: dict[str, dict[str, str]] = defaultdict(dict)
        for module in description.modules:
            if module.common_name:
                parent = module.path.rpartition(".")[0] if module.common_name in _IN_BLOCK else ""
                self._aliases[parent][module.common_name] = module.path
        for old, new in (rename or {}).items():
            self._add_alias(old, new)
        moments = moments or _first_calls(description.modules)
        self._places = {moment: place for place, moment in enumerate(moments, 1)}

    def __contains__(self, path: str) -> bool:
        return path in self._modules

    def __getitem__(self, path: str) -> model_pb2.Module:
        return self._modules[path]

    @property
    def modules(self) -> Collection[model_pb2.Module]:
        """All modules, parents before children."""
        return self._modules.values()

    def find(self, parent: str, path: str) -> str | None:
        """Gives the full path of a module below another, by its own or further names."""
        full = f"{parent}.{path}" if parent else path
        if full in self._modules:
            return full
        found: str | None = parent
        for name in path.split("."):
            below = f"{found}.{name}" if found else name
            found = below if below in self._modules else self._aliases[found or ""].get(name)
            if found is None:
                return None
        return found

    def _add_alias(self, old: str, new: str) -> None:
        paths = [old] if "." in old else [p for p in self._modules if p.rpartition(".")[2] == old]
        for path in paths:
            parent = "" if "." in old else path.rpartition(".")[0]
            if new in self._children[parent] or not new.isidentifier():
                raise error(
                    Reason.INVALID_CONFIGURATION,
                    f"rename={{{old!r}: {new!r}}}: {parent or 'the model'} has a module {new!r} "
                    "already, or that is no name; choose another",
                    modulePath=path,
                )
            if path in self._modules:
                self._aliases[parent][new] = path

    def children(self, path: str) -> list[str]:
        """Gives the names of a module's children, in order."""
        return self._children.get(path, [])

    def names(self, path: str) -> list[str]:
        """Gives all names that stand below a module: its children's, and further ones."""
        further = [*self._aliases.get(path, ()), *(RESIDUAL if self.is_block(path) else ())]
        return list(dict.fromkeys([*self.children(path), *further]))

    def is_block(self, path: str) -> bool:
        """Whether a path is a decoder layer's."""
        return path in self._modules and self._modules[path].is_block

    def point(self, parent: str, name: str) -> str | None:
        """Gives the path of a place inside of a module, if the name is one's."""
        path = self.find(parent, name)
        return path if path is not None and self._modules[path].is_point else None

    def head_sizes(self, path: str) -> tuple[int, int] | None:
        """Gives how many heads an attention has, and the size of each; None if it shows none."""
        if f"{path}.heads.z" not in self._modules:
            return None
        # [batch, head, query, head_dim]
        dimensions = self._modules[f"{path}.heads.z"].output.tensor.dimensions
        return dimensions[1].factor, dimensions[3].factor

    def _holds_points(self, path: str) -> bool:
        children = self.children(path)
        points = [f"{path}.{name}" for name in children] or [path]
        return all(point in self._modules and self._modules[point].is_point for point in points)

    def place(self, path: str, *, is_input: bool, call_index: int = 0) -> int:
        """Gives the place in the forward pass at which a module is entered or left, from 1.

        0 if it is not known.
        """
        return self._places.get((path, is_input, call_index), 0)

    @property
    def num_moments(self) -> int:
        """How many places a forward pass has, of those that are known."""
        return len(self._places)

    def unknown(self, path: str, location: Location) -> Exception:
        """Makes the error for a path that does not exist; names the nearest that do."""
        near = difflib.get_close_matches(path, self._modules, n=3, cutoff=0.6)
        parent = path.rpartition(".")[0]
        names = ", ".join(self.names(parent)[:16])
        has = f"; {parent or 'the model'} has {names}" if names else ""
        return error(
            Reason.UNKNOWN_MODULE_PATH,
            f"{self._model} has no module {path!r}; the nearest are "
            f"{', '.join(near) or 'none'}{has}{_WHY.get(path.rpartition('.')[2], '')}",
            location=location,
            modulePath=path,
            model=self._model,
        )

    def render(self, path: str = "") -> str:
        """Draws the tree below a module, as torch does; points are drawn below what holds them."""
        module = self._modules[path]
        children = self.children(path)
        own = [name for name in children if not self._holds_points(f"{path}.{name}".lstrip("."))]
        names = own or children
        if not names:
            return f"{module.class_name}({module.detail})"
        lines = [
            f"  ({name}): " + self.render(f"{path}.{name}" if path else name).replace("\n", "\n  ")
            for name in names
        ]
        if module.class_name == "ModuleList":
            lines = _folded(lines)
        return "\n".join([f"{module.class_name}(", *lines, ")"])


def _first_calls(modules: Sequence[model_pb2.Module]) -> list[Moment]:
    """Gives the moments of a forward pass: a module is left after all that it calls."""
    called = sorted((m for m in modules if m.call_order), key=lambda module: module.call_order)
    moments: list[Moment] = []
    entered: list[str] = []
    for path in (*(module.path for module in called), None):
        while entered and (path is None or not _is_inside(path, entered[-1])):
            moments.append((entered.pop(), False, 0))
        if path is not None:
            moments.append((path, True, 0))
            entered.append(path)
    return moments


def _is_inside(path: str, other: str) -> bool:
    return not other or path.startswith(f"{other}.")


def _folded(lines: list[str]) -> list[str]:
    """Draws runs of equal children once, as "(0-29): 30 x ..."."""
    folded: list[str] = []
    start = 0
    while start < len(lines):
        name, _, body = lines[start].partition(": ")
        end = start + 1
        while end < len(lines) and lines[end].partition(": ")[2] == body:
            end += 1
        if end - start > 1:
            last = lines[end - 1].partition(": ")[0].strip("() ")
            folded.append(f"{name.rstrip(')')}-{last}): {end - start} x {body}")
        else:
            folded.append(lines[start])
        start = end
    return folded
