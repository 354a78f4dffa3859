"""Draws what an experiment found, as heat maps side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

if TYPE_CHECKING:
    import torch


@dataclass
class HeatMap:
    """Numbers by row and column, and what these are."""

    title: str
    values: torch.Tensor  # [rows, columns]
    rows: list[str]
    columns: list[str]
    row_label: str = "layer"
    column_label: str = "position"


def draw(path: str, *maps: HeatMap) -> None:
    """Writes the maps as one picture; white is 0."""
    figure, axes = plt.subplots(
        1, len(maps), figsize=(7 * len(maps), 5), layout="constrained", squeeze=False
    )
    for ax, each in zip(axes[0], maps, strict=True):
        bound = float(each.values.abs().max())
        image = ax.imshow(
            each.values.numpy(), cmap="RdBu", vmin=-bound, vmax=bound, aspect="auto", origin="lower"
        )
        ax.set_xticks(range(len(each.columns)), each.columns, rotation=60, ha="right")
        ax.set_yticks(range(len(each.rows)), each.rows)
        ax.set(xlabel=each.column_label, ylabel=each.row_label, title=each.title)
        figure.colorbar(image, ax=ax)
    figure.savefig(path)
    plt.close(figure)
