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
from support.up import Up, insitu

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
rules_file = _script("rules")


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


def test_the_rules_of_insitu_up_are_those_of_the_manifests() -> None:
    assert rules_file.FILE.read_text() == rules_file.text(), "run rules.py"


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
def test_promtool_takes_the_scrape_configuration_which_finds_what_the_pod_monitor_does(
    tmp_path: Path,
) -> None:
    settings = yaml.safe_load((DEPLOY / "monitoring/prometheus.yml").read_text())
    (job,) = settings["scrape_configs"]
    # Debian's Prometheus is built without the clusters' discovery.
    (discovery,) = job.pop("kubernetes_sd_configs")
    assert discovery == {"role": "pod", "namespaces": {"names": ["insitu"]}}
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(settings))
    (tmp_path / "prometheus_rules.yml").write_text(rules_file.text())
    found = subprocess.run(
        ["promtool", "check", "config", "prometheus.yml"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout + found.stderr
    keep, name = job["relabel_configs"]
    monitor = yaml.safe_load((DEPLOY / "k8s/components/monitoring/monitors.yaml").read_text())
    part_of = monitor["spec"]["selector"]["matchLabels"]["app.kubernetes.io/part-of"]
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert keep["regex"] == f"{part_of};{endpoint['port']}"
    assert name["replacement"] == endpoint["relabelings"][0]["replacement"]


@needs_prometheus
def test_insitu_up_starts_prometheus_and_every_panel_has_data_while_sessions_run(
    tmp_path: Path, tiny: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Up(tmp_path, [f"tiny/llama={tiny.folder('llama')}"], ["--monitoring"]) as up:
        line = up.next_line()
        assert line.startswith("Prometheus is at http://127.0.0.1:")
        prometheus = Prometheus(line.split()[-1])
        monkeypatch.setenv("INSITU_ENDPOINT", up.endpoint)
        monkeypatch.setattr(CONFIG, "_api_key", "tests")
        model = LanguageModel("tiny/llama")
        prometheus.wait_for("insitu_build_info and on () insitu_shard_build_info")
        for _ in range(3):
            _run_some(model)
            # A scrape apart.
            time.sleep(5.5)
        prometheus.wait_for("increase(insitu_sessions_finished_total[30s]) > 0")
        for expression in _expressions():
            found = prometheus.wait_for(_filled_in(expression))
            values = [float(series["value"][1]) for series in found]
            assert any(not math.isnan(value) for value in values), expression
        # Nothing is wrong, and no alert says so.
        assert prometheus.query('ALERTS{alertstate="firing"}') == []


def test_without_prometheus_the_flag_says_how_to_get_it(tmp_path: Path, tiny: TinyModels) -> None:
    flags = ["--model", f"tiny/llama={tiny.folder('llama')}", "--port", "0", "--monitoring"]
    done = insitu("up", *flags, "--data-dir", str(tmp_path), PATH=str(tmp_path))
    assert (done.returncode, done.stdout) == (1, "")
    assert "apt-get install prometheus" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def _filled_in(expression: str) -> str:
    filled = expression.replace("$__rate_interval", "30s").replace("[1h]", "[30s]")
    return filled.replace("$model", ".*").replace("$instance", ".*").replace("_1h", "_5m")


def _run_some(model: LanguageModel) -> None:
    with model.session(remote=True):
        for number in range(4):
            with model.trace([5, 9, 17]):
                model.model.layers[number % 3].output[0][:, -1] = 0
                model.lm_head.output[0, -1].argmax().save()
