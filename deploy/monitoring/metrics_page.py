"""Writes docs/metrics.md from the metrics that the programs register.

`python deploy/monitoring/metrics_page.py` writes it; the tests see that it is current.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from insitu_scheduler.metrics import SchedulerMetrics
from insitu_shard.metrics import ShardMetrics

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client import CollectorRegistry

PAGE = Path(__file__).parents[2] / "docs/metrics.md"
_HEAD = """# Metrics

Served at `/metrics` by the scheduler (`--metrics-port`) and by the leader of each shard group,
which tells of its other ranks, too. How long people wait is `insitu_queue_latency_seconds`; a
queue that is stuck shows in `insitu_queue_oldest_age_seconds`, for what waits has no latency yet,
and `insitu_queue_expected_wait_seconds` says what a newcomer would wait. No label holds a user, a
session or a key.

Labels: `model` as sessions name it (empty for sessions that need none); `outcome` of a wait
(`dispatched`, `cancelled`, `error`), of a session (`completed`, `error`, `cancelled`, or
`interrupted` where it is run again) or of a segment (`completed`, `failed`, `cancelled`);
`reason` as in [errors](errors/README.md); `state` of a group (`ready`, `busy`, `draining`);
`event` of a lease (`granted`, `replaced`, `ended`, `expired`); `rank` from 0; `method` and `code`
as in gRPC. Both programs also tell their memory, CPU time and open files as `process_...`, and
their garbage collection as `python_gc_...`.

Histograms of times have buckets from 1 ms to 1 h, and one edge at 5 s, the objective of the alerts.

This page is written by `deploy/monitoring/metrics_page.py`.
"""


def registries() -> dict[str, CollectorRegistry]:
    """Gives the registries of the programs, by the program's name."""
    return {"scheduler": SchedulerMetrics("").registry, "shard group": ShardMetrics("").registry}


def page() -> str:
    """Gives the page."""
    return "".join([_HEAD, *_sections()])


def _sections() -> Iterator[str]:
    for program, registry in registries().items():
        yield f"\n## Of the {program}\n\n"
        yield "| name | type | labels | what it tells |\n|---|---|---|---|\n"
        ours = {
            collector
            for name, collector in registry._names_to_collectors.items()
            if name.startswith("insitu")
        }
        for collector in sorted(ours, key=_name):
            labels = ", ".join(f"`{label}`" for label in collector._labelnames) or "-"
            name, kind, text = _name(collector), collector._type, collector._documentation
            yield f"| `{name}` | {kind} | {labels} | {text} |\n"


def _name(collector: Any) -> str:
    suffix = {"counter": "_total", "info": "_info"}.get(collector._type, "")
    return f"{collector._name}{suffix}"


if __name__ == "__main__":
    PAGE.write_text(page())
