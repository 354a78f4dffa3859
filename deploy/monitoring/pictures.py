"""Draws the dashboards' panels from a Prometheus, for where there is no Grafana.

`python deploy/monitoring/pictures.py http://127.0.0.1:9090 --minutes 5`, while `insitu up
--monitoring` runs, under the load of load.py.
"""

from __future__ import annotations

import json
import math
import time
import urllib.parse
import urllib.request
from argparse import ArgumentParser
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib as mpl
from dashboards import DASHBOARDS, Panel
from matplotlib import dates, ticker
from matplotlib import pyplot as plt

_COLUMNS = 3
_STEP_SECONDS = 5
_RATE_INTERVAL = "30s"
_MAX_SERIES = 8
_UNITS = {
    "s": lambda: ticker.EngFormatter("s"),
    "bytes": lambda: ticker.EngFormatter("B"),
    "Bps": lambda: ticker.EngFormatter("B/s"),
    "percentunit": lambda: ticker.PercentFormatter(1.0),
    "ops": lambda: ticker.FormatStrFormatter("%g/s"),
    "short": lambda: ticker.FormatStrFormatter("%g"),
}


def main() -> None:
    """Draws a picture for each dashboard."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("prometheus", help="its address, such as http://127.0.0.1:9090")
    parser.add_argument("--minutes", type=float, default=5, help="how long a time they show")
    parser.add_argument("--ago", type=float, default=0, help="minutes since the end of that time")
    parser.add_argument("--output", type=Path, default=Path("docs/images"))
    arguments = parser.parse_args()
    mpl.use("agg")
    arguments.output.mkdir(parents=True, exist_ok=True)
    span = {"ends_at": time.time() - 60 * arguments.ago, "seconds": 60 * arguments.minutes}
    for uid, (title, panels, _) in DASHBOARDS.items():
        figure = draw(title, panels, arguments.prometheus, **span)
        figure.savefig(arguments.output / f"{uid}.png", dpi=72)


def draw(
    title: str, panels: list[Panel], prometheus: str, *, ends_at: float, seconds: float
) -> Any:
    """Gives a figure with the panels of a dashboard, over the seconds before a time."""
    num_rows = math.ceil(len(panels) / _COLUMNS)
    figure, grid = plt.subplots(
        num_rows, _COLUMNS, figsize=(16, 2.7 * num_rows), layout="constrained", squeeze=False
    )
    figure.suptitle(title)
    for axes, panel in zip(grid.flat, panels, strict=False):
        _draw_panel(axes, panel, prometheus, ends_at=ends_at, seconds=seconds)
    for axes in list(grid.flat)[len(panels) :]:
        axes.axis("off")
    return figure


def _draw_panel(
    axes: Any, panel: Panel, prometheus: str, *, ends_at: float, seconds: float
) -> None:
    axes.set_title(panel.title, fontsize=9, loc="left")
    number = 0
    for legend, expression in panel.queries.items():
        for series in query(prometheus, expression, ends_at=ends_at, seconds=seconds):
            number += 1
            if number > _MAX_SERIES:
                break
            times = [datetime.fromtimestamp(float(at), UTC) for at, _ in series["values"]]
            values = [float(value) for _, value in series["values"]]
            axes.plot(times, values, lw=1.2, label=_label(legend, series["metric"]))
    axes.xaxis.set_major_formatter(dates.DateFormatter("%H:%M"))
    axes.yaxis.set_major_formatter(_UNITS[panel.unit]())
    axes.tick_params(labelsize=7)
    axes.set_xlim(
        datetime.fromtimestamp(ends_at - seconds, UTC), datetime.fromtimestamp(ends_at, UTC)
    )
    # The legend stands above the lines.
    axes.set_ylim(0, 1.4 * axes.get_ylim()[1])
    if number:
        axes.legend(fontsize=6, loc="upper left")


def query(prometheus: str, expression: str, *, ends_at: float, seconds: float) -> list[Any]:
    """Gives an expression's series over the seconds before a time."""
    filled = expression.replace("$__rate_interval", _RATE_INTERVAL)
    filled = filled.replace("$model", ".*").replace("$instance", ".*")
    arguments = {
        "query": filled,
        "start": f"{ends_at - seconds:.0f}",
        "end": f"{ends_at:.0f}",
        "step": str(_STEP_SECONDS),
    }
    address = f"{prometheus}/api/v1/query_range?{urllib.parse.urlencode(arguments)}"
    with urllib.request.urlopen(address) as response:
        found: list[Any] = json.load(response)["data"]["result"]
    return found


def _label(legend: str, labels: dict[str, str]) -> str:
    for name, value in labels.items():
        legend = legend.replace("{{" + name + "}}", value.rpartition("/")[2])
    # Sessions of several models wait in a line of their own, which has no model's name.
    return legend.replace("{{model}}", "several models")


if __name__ == "__main__":
    main()
