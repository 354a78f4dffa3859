"""Metrics, rules and dashboards agree, and with a real Prometheus every panel has data."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from insitu import CONFIG, LanguageModel
from support.manifests import DEPLOY
from support.prometheus import HAS_PROMETHEUS, Prometheus, rules
from support.up import Up

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType

    from support.tiny_models import TinyModels

needs_prometheus = pytest.mark.skipif(
    not HAS_PROMETHEUS, reason="prometheus and promtool are not here (apt install prometheus)"
)
_SUFFIXES = ("_bucket", "_sum", "_count", "_total", "_info")


def _script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DEPLOY / "monitoring" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


dashboards, metrics_page = _script("dashboards"), _script("metrics_page")


def _expressions() -> list[str]:
    return [
        query
        for _, panels, _ in dashboards.DASHBOARDS.values()
        for panel in panels
        for query in panel.queries.values()
    ]


def _metrics() -> set[str]:
    return {
        name for registry in metrics_page.registries().values()
        for name in registry._names_to_collectors
    }  # fmt: skip


def _rules(kind: str) -> list[dict[str, Any]]:
    return [rule for group in rules()["groups"] for rule in group["rules"] if kind in rule]


def test_the_page_of_metrics_is_current() -> None:
    assert metrics_page.PAGE.read_text() == metrics_page.page(), "run metrics_page.py"


@pytest.mark.parametrize("uid", dashboards.DASHBOARDS)
def test_the_dashboards_are_current(uid: str) -> None:
    text = (dashboards.FOLDER / f"{uid}.json").read_text()
    assert text == dashboards.text(uid), "run dashboards.py"
    panels = json.loads(text)["panels"]
    assert all(panel["description"] and panel["title"] for panel in panels)


def test_rules_and_panels_ask_for_metrics_that_there_are() -> None:
    known = _metrics() | {rule["record"] for rule in _rules("record")}
    expressions = [*_expressions(), *(rule["expr"] for rule in _rules("expr"))]
    asked = {name for text in expressions for name in re.findall(r"insitu[a-z0-9_:]*", text)}
    asked.discard("insitu")
    assert asked
    assert {name for name in asked if name not in known} == set()


def test_every_alert_has_its_entry_in_the_runbook() -> None:
    page = (DEPLOY.parent / "docs/runbook.md").read_text()
    headings = set(re.findall(r"^## (\w+)$", page, flags=re.MULTILINE))
    assert headings == {rule["alert"] for rule in _rules("alert")}
    for rule in _rules("alert"):
        assert rule["annotations"]["runbook_url"].endswith(rule["alert"].lower())


@needs_prometheus
def test_promtool_takes_the_rules_and_the_alerts_fire_when_they_should(tmp_path: Path) -> None:
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(rules()))
    cases = (DEPLOY / "monitoring/rules_test.yml").read_text()
    (tmp_path / "rules_test.yml").write_text(cases)
    tests = yaml.safe_load(cases)["tests"]
    tested = {case["alertname"] for test in tests for case in test["alert_rule_test"]}
    assert tested == {rule["alert"] for rule in _rules("alert")}
    for command in (["check", "rules", "rules.yml"], ["test", "rules", "rules_test.yml"]):
        found = subprocess.run(
            ["promtool", *command], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert found.returncode == 0, found.stdout + found.stderr


@needs_prometheus
def test_every_panel_has_data_while_sessions_run(
    tmp_path: Path, tiny: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Up(tmp_path / "up", [f"tiny/llama={tiny.folder('llama')}"]) as up:
        (shard,) = set(re.findall(r"metrics are at http://([^/]+)/metrics", up.log)) - {
            up.metrics_address
        }
        targets = {"insitu-scheduler": [up.metrics_address], "insitu-shard": [shard]}
        monkeypatch.setenv("INSITU_ENDPOINT", up.endpoint)
        monkeypatch.setattr(CONFIG, "_api_key", "tests")
        model = LanguageModel("tiny/llama")
        with Prometheus(tmp_path, targets) as prometheus:
            prometheus.wait_for("insitu_build_info")
            for _ in range(3):
                _run_some(model)
                # More than a scrape apart.
                time.sleep(1.2)
            prometheus.wait_for("increase(insitu_sessions_finished_total[30s]) > 0")
            for expression in _expressions():
                here = expression.replace("$__rate_interval", "30s").replace("$model", ".*")
                found = prometheus.wait_for(here)
                values = [float(series["value"][1]) for series in found]
                assert any(not math.isnan(value) for value in values), expression


def _run_some(model: LanguageModel) -> None:
    with model.session(remote=True):
        for number in range(4):
            with model.trace([5, 9, 17]):
                model.model.layers[number % 3].output[0][:, -1] = 0
                model.lm_head.output[0, -1].argmax().save()
