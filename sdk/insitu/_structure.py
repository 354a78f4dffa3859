"""The module tree of a model, as its description tells it."""

from __future__ import annotations

import difflib
from collections import defaultdict
from typing import TYPE_CHECKING

from insitu_wire.errors import Reason, error

if TYPE_CHECKING:
    from collections.abc import Sequence

    from insitu_proto.v1 import model_pb2
    from insitu_wire.errors import Location


class ModuleTree:
    """The modules of a model by path, and who is whose child."""

    def __init__(self, description: model_pb2.ModelDescription) -> None:
        self._modules = {module.path: module for module in description.modules}
        self._children: dict[str, list[str]] = defaultdict(list)
        for path in self._modules:
            if path:
                parent, _, name = path.rpartition(".")
                self._children[parent].append(name)
        self._model = description.name
        self._places = _places(description.modules)

    def __contains__(self, path: str) -> bool:
        return path in self._modules

    def __getitem__(self, path: str) -> model_pb2.Module:
        return self._modules[path]

    def children(self, path: str) -> list[str]:
        """Gives the names of a module's children, in order."""
        return self._children.get(path, [])

    def place(self, path: str, *, is_input: bool) -> int:
        """Gives the place in the forward pass at which a module is entered or left, from 1.

        0 if it is not known.
        """
        return self._places.get((path, is_input), 0)

    def unknown(self, path: str, location: Location) -> Exception:
        """Makes the error for a path that does not exist; names the nearest that do."""
        near = difflib.get_close_matches(path, self._modules, n=3, cutoff=0.6)
        parent = path.rpartition(".")[0]
        names = ", ".join(self.children(parent)[:12])
        has = f"; {parent or 'the model'} has {names}" if names else ""
        return error(
            Reason.UNKNOWN_MODULE_PATH,
            f"{self._model} has no module {path!r}; the nearest are "
            f"{', '.join(near) or 'none'}{has}",
            location=location,
            modulePath=path,
            model=self._model,
        )

    def render(self, path: str = "") -> str:
        """Draws the tree below a module, as torch does."""
        module = self._modules[path]
        names = self.children(path)
        if not names:
            return f"{module.class_name}({module.detail})"
        lines = [
            f"  ({name}): " + self.render(f"{path}.{name}" if path else name).replace("\n", "\n  ")
            for name in names
        ]
        if module.class_name == "ModuleList":
            lines = _folded(lines)
        return "\n".join([f"{module.class_name}(", *lines, ")"])


def _places(modules: Sequence[model_pb2.Module]) -> dict[tuple[str, bool], int]:
    """Numbers the moments of a forward pass: a module is left after all that it calls."""
    called = sorted((m for m in modules if m.call_order), key=lambda module: module.call_order)
    places: dict[tuple[str, bool], int] = {}
    entered: list[str] = []
    for path in (*(module.path for module in called), None):
        while entered and (path is None or not _is_inside(path, entered[-1])):
            places[entered.pop(), False] = len(places) + 1
        if path is not None:
            places[path, True] = len(places) + 1
            entered.append(path)
    return places


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
