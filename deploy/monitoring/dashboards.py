"""Writes the Grafana dashboards as JSON, from the list of their panels.

`python deploy/monitoring/dashboards.py` writes them; the tests see that they are current, and run
every query.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "k8s/components/monitoring/dashboards"
_WIDTH, _HEIGHT, _COLUMNS = 8, 8, 3


@dataclass(frozen=True)
class Panel:
    """A panel: its queries by their legend."""

    title: str
    unit: str
    about: str
    queries: dict[str, str]


def _quantiles(metric: str, selector: str, by: str = "model") -> dict[str, str]:
    legend = "{{" + by + "}}"
    return {
        f"{legend} p{round(100 * quantile)}": f"histogram_quantile({quantile}, sum by ({by}, le) "
        f"(rate({metric}_bucket{selector}[$__rate_interval])))"
        for quantile in (0.5, 0.95, 0.99)
    }


def _rate(metric: str, selector: str, by: str) -> dict[str, str]:
    legend = " ".join("{{" + label.strip() + "}}" for label in by.split(","))
    return {legend: f"sum by ({by}) (rate({metric}{selector}[$__rate_interval]))"}


def _queue(selector: str) -> list[Panel]:
    return [
        Panel(
            "Queue latency",
            "s",
            "From a session's acceptance to its dispatch.",
            _quantiles("insitu_queue_latency_seconds", selector),
        ),
        Panel(
            "Longest wait now",
            "s",
            "How long the session has waited that waits longest. It shows a queue that is stuck.",
            {"{{model}}": f"max by (model) (insitu_queue_oldest_age_seconds{selector})"},
        ),
        Panel(
            "Sessions",
            "short",
            "Those that wait, and those that run.",
            {
                "{{model}} wait": f"sum by (model) (insitu_queue_sessions{selector})",
                "{{model}} run": f"sum by (model) (insitu_sessions_running{selector})",
            },
        ),
        Panel(
            "Backlog",
            "s",
            "Time of a shard group that the waiting sessions are expected to take.",
            {"{{model}}": f"sum by (model) (insitu_queue_backlog_seconds{selector})"},
        ),
        Panel(
            "Expected wait",
            "s",
            "What a session would wait that a new user sent now, by estimate.",
            {"{{model}}": f"max by (model) (insitu_queue_expected_wait_seconds{selector})"},
        ),
        Panel(
            "Sessions that waited for more than 5 s",
            "percentunit",
            "Over an hour. The objective: at most 1% over 30 days.",
            {"{{model}}": f"insitu:queue_slow:ratio_1h{selector}"},
        ),
        Panel(
            "Users who wait",
            "short",
            "Users of whom at least one session waits.",
            {"{{model}}": f"sum by (model) (insitu_queue_users{selector})"},
        ),
        Panel(
            "Fairness",
            "percentunit",
            "Jain's index over the users who waited all of the last minute: 1 if all got the same.",
            {"{{model}}": f"min by (model) (insitu_fairness_ratio{selector})"},
        ),
        Panel(
            "Session, from acceptance to end",
            "s",
            "Waiting, running and being run again together.",
            _quantiles("insitu_session_duration_seconds", selector),
        ),
        Panel(
            "Finished sessions",
            "ops",
            "By how they ended.",
            _rate("insitu_sessions_finished_total", selector, "model, outcome"),
        ),
        Panel(
            "Shard groups",
            "short",
            "Ready groups have room, busy ones have none.",
            {"{{model}} {{state}}": f"sum by (model, state) (insitu_groups{selector})"},
        ),
    ]


def _groups(selector: str) -> list[Panel]:
    layers = "insitu_shard_layers_total"
    saved = selector.replace("{", '{outcome="saved",')
    return [
        Panel(
            "Pass",
            "s",
            "Time that a forward pass takes.",
            _quantiles("insitu_shard_pass_seconds", selector),
        ),
        Panel(
            "Traces that share a pass",
            "short",
            "1 means that nothing is merged.",
            {
                "{{model}}": f"sum by (model) (rate(insitu_shard_pass_traces_sum{selector}"
                "[$__rate_interval])) / sum by (model) (rate(insitu_shard_pass_traces_count"
                f"{selector}[$__rate_interval]))"
            },
        ),
        Panel(
            "Layers saved",
            "percentunit",
            "Part of the layers that a pass for each trace would have run.",
            {
                "{{model}}": f"sum by (model) (rate({layers}{saved}[$__rate_interval])) / "
                f"sum by (model) (rate({layers}{selector}[$__rate_interval]))"
            },
        ),
        Panel(
            "Values kept",
            "bytes",
            "Memory of the values that sessions keep, by group.",
            {"{{instance}}": f"sum by (instance) (insitu_shard_handle_bytes{selector})"},
        ),
        Panel(
            "Uploads cached",
            "bytes",
            "Memory of the tensors that users brought, by group.",
            {"{{instance}}": f"sum by (instance) (insitu_shard_upload_cache_bytes{selector})"},
        ),
        Panel(
            "Segments that run",
            "short",
            "By group.",
            {"{{instance}}": f"sum by (instance) (insitu_shard_segments_running{selector})"},
        ),
    ]


def _group(selector: str) -> list[Panel]:
    ranks = selector.replace("{", '{kind="used",')
    total = selector.replace("{", '{kind="total",')
    return [
        Panel(
            "Busy",
            "percentunit",
            "Part of the time in which the engine ran segments.",
            {
                "{{instance}}": f"sum by (instance) (rate(insitu_shard_busy_seconds_total{selector}"
                "[$__rate_interval]))"
            },
        ),
        Panel(
            "Rows of a pass",
            "short",
            "Where the pass is widest.",
            _quantiles("insitu_shard_pass_rows", selector, "instance"),
        ),
        Panel(
            "Segments",
            "ops",
            "By how they ended.",
            _rate("insitu_shard_segment_seconds_count", selector, "instance, outcome"),
        ),
        Panel(
            "Memory of the ranks",
            "percentunit",
            "What is used of a rank's GPU, or of its part of the pod's or machine's memory.",
            {
                "{{instance}} rank {{rank}}": f"insitu_shard_rank_memory_bytes{ranks} / "
                f"ignoring (kind) insitu_shard_rank_memory_bytes{total}"
            },
        ),
        Panel(
            "CPU of the ranks",
            "short",
            "Cores that a rank's process keeps busy.",
            {
                "{{instance}} rank {{rank}}": "sum by (instance, rank) "
                f"(rate(insitu_shard_rank_cpu_seconds_total{selector}[$__rate_interval]))"
            },
        ),
        Panel(
            "Time in collectives",
            "percentunit",
            "Part of its time that a rank spends in exchanging tensors, or waiting to.",
            {
                "{{instance}} rank {{rank}}": "sum by (instance, rank) "
                f"(rate(insitu_shard_collective_seconds_total{selector}[$__rate_interval]))"
            },
        ),
        Panel(
            "Values of sessions",
            "bytes",
            "Memory of what sessions keep between their steps, and how much all may together.",
            {
                "{{instance}}": f"sum by (instance) (insitu_shard_session_bytes{selector})",
                "{{instance}} at most": "sum by (instance) "
                f"(insitu_shard_handle_limit_bytes{selector})",
            },
        ),
        Panel(
            "Kept beyond sessions",
            "bytes",
            "By the user who keeps most, and how much one may.",
            {
                "{{instance}}": f"max by (instance) (insitu_shard_kept_bytes{selector})",
                "{{instance}} at most": "max by (instance) "
                f"(insitu_shard_kept_limit_bytes{selector})",
            },
        ),
        Panel(
            "Loading took",
            "s",
            "From its start until the model was there.",
            {"{{instance}}": f"max by (instance) (insitu_shard_load_seconds{selector})"},
        ),
    ]


def _operation() -> list[Panel]:
    return [
        Panel(
            "Calls",
            "ops",
            "Calls that ended, by method and status.",
            _rate("insitu_rpcs_total", "", "method, code"),
        ),
        Panel(
            "Call duration",
            "s",
            "Streams to their end.",
            _quantiles("insitu_rpc_seconds", "", "method"),
        ),
        Panel(
            "Journal commits",
            "s",
            "Time that a commit takes: every submission waits for one.",
            _quantiles("insitu_journal_commit_seconds", "", "job"),
        ),
        Panel(
            "Cost against expectation",
            "short",
            "1 means that the queue knows what sessions cost.",
            _quantiles("insitu_cost_ratio", ""),
        ),
        Panel(
            "Writes that wait for the journal",
            "short",
            "They are committed together.",
            {"pending": "sum(insitu_journal_pending)"},
        ),
        Panel(
            "Deciding what runs next",
            "s",
            "Time that it takes.",
            _quantiles("insitu_decision_seconds", "", "job"),
        ),
        Panel(
            "Leases",
            "short",
            "What happened to leases of shard groups within an hour.",
            {"{{model}} {{event}}": "sum by (model, event) (increase(insitu_leases_total[1h]))"},
        ),
        Panel(
            "Sessions kept in memory",
            "bytes",
            "Size of those that wait or run.",
            {"sessions": "sum(insitu_queue_bytes)"},
        ),
        Panel(
            "Downloads",
            "Bps",
            "Saved values that clients fetched.",
            {"downloads": "sum(rate(insitu_result_bytes_total[$__rate_interval]))"},
        ),
        Panel(
            "Memory of the processes",
            "bytes",
            "Of those that are scraped.",
            {"{{job}} {{instance}}": 'process_resident_memory_bytes{job=~"insitu.*"}'},
        ),
    ]


DASHBOARDS = {
    "insitu-overview": ("insitu: overview", _queue(""), ""),
    "insitu-model": (
        "insitu: a model and its groups",
        [*_queue('{model=~"$model"}'), *_groups('{model=~"$model"}')],
        "model",
    ),
    "insitu-group": (
        "insitu: a shard group",
        [*_groups('{instance=~"$instance"}'), *_group('{instance=~"$instance"}')],
        "instance",
    ),
    "insitu-operation": ("insitu: administration", _operation(), ""),
}


def dashboard(uid: str) -> dict[str, Any]:
    """Gives a dashboard in Grafana's own form."""
    title, panels, variable = DASHBOARDS[uid]
    source = {"type": "prometheus", "uid": "${datasource}"}
    variables: list[dict[str, Any]] = [
        {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Data source"}
    ]
    if variable:
        metric = "insitu_groups" if variable == "model" else "insitu_shard_handles"
        query = f"label_values({metric}, {variable})"
        variables.append(
            {
                "name": variable, "type": "query", "datasource": source, "query": query,
                "refresh": 2, "multi": True, "includeAll": True, "label": variable.title(),
            }
        )  # fmt: skip
    return {
        "uid": uid,
        "title": title,
        "tags": ["insitu"],
        "schemaVersion": 39,
        "refresh": "15s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": variables},
        "panels": [_panel(number, panel, source) for number, panel in enumerate(panels)],
    }


def _panel(number: int, panel: Panel, source: dict[str, str]) -> dict[str, Any]:
    row, column = divmod(number, _COLUMNS)
    targets = [
        {"refId": chr(65 + at), "datasource": source, "expr": expr, "legendFormat": legend}
        for at, (legend, expr) in enumerate(panel.queries.items())
    ]
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.about,
        "datasource": source,
        "gridPos": {"x": column * _WIDTH, "y": row * _HEIGHT, "w": _WIDTH, "h": _HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "targets": targets,
    }


def text(uid: str) -> str:
    """Gives a dashboard as the file has it."""
    return json.dumps(dashboard(uid), indent=2) + "\n"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name in DASHBOARDS:
        (FOLDER / f"{name}.json").write_text(text(name))
