"""The Kubernetes manifests: they render, hold together, and what they start runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import kubernetes_validate
import pytest
import torch
import typer

import insitu_scheduler.__main__ as scheduler_main
import insitu_shard.__main__ as shard_main
from insitu import CONFIG, LanguageModel
from support.manifests import HAS_KUBECTL, OVERLAYS, Cluster, Manifests, entry_point

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.skipif(not HAS_KUBECTL, reason="kubectl, which renders them, is not here")

# Of operators that a cluster may have: their schemas are not Kubernetes' own.
_FOREIGN = {"PodMonitor", "PrometheusRule", "ScaledObject"}
_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.fixture(params=OVERLAYS)
def manifests(request: pytest.FixtureRequest) -> Manifests:
    return Manifests(request.param)


def _pods(manifests: Manifests) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    for workload in manifests.workloads:
        template = workload["spec"]["template"]
        for container in template["spec"]["containers"]:
            yield template, container


def _selects(selector: dict[str, str], template: dict[str, Any]) -> bool:
    return selector.items() <= template["metadata"]["labels"].items()


@pytest.mark.parametrize("version", ["1.32", "1.36"])
def test_every_object_is_what_kubernetes_takes(manifests: Manifests, version: str) -> None:
    for found in manifests.objects:
        if found["kind"] not in _FOREIGN:
            kubernetes_validate.validate(found, version, strict=True)


def test_every_selector_selects_a_pod(manifests: Manifests) -> None:
    templates = [workload["spec"]["template"] for workload in manifests.workloads]
    selectors = [found["spec"]["selector"] for found in manifests.of("Service")]
    for kind, key in (("PodDisruptionBudget", "selector"), ("NetworkPolicy", "podSelector")):
        selectors += [found["spec"][key].get("matchLabels", {}) for found in manifests.of(kind)]
    selectors += [found["spec"]["selector"]["matchLabels"] for found in manifests.of("PodMonitor")]
    for selector in selectors:
        assert any(_selects(selector, template) for template in templates), selector


def test_a_workload_selects_its_own_pods_alone(manifests: Manifests) -> None:
    for workload in manifests.workloads:
        selector = workload["spec"]["selector"]["matchLabels"]
        selected = [
            other["metadata"]["name"]
            for other in manifests.workloads
            if _selects(selector, other["spec"]["template"])
        ]
        assert selected == [workload["metadata"]["name"]]


def test_named_ports_volumes_maps_and_secrets_are_there(manifests: Manifests) -> None:
    for template, container in _pods(manifests):
        volumes = {volume["name"] for volume in template["spec"].get("volumes", [])}
        for workload in manifests.workloads:
            for claim in workload["spec"].get("volumeClaimTemplates", []):
                volumes.add(claim["metadata"]["name"])
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
        assert manifests.environment(container)
    ports = {port["name"] for _, container in _pods(manifests) for port in container["ports"]}
    for service in manifests.of("Service"):
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
    for policy in manifests.of("NetworkPolicy"):
        for rule in policy["spec"].get("ingress", []):
            assert {port["port"] for port in rule["ports"]} <= ports


def test_every_container_is_hardened_and_bounded(manifests: Manifests) -> None:
    for template, container in _pods(manifests):
        assert template["spec"]["securityContext"]["runAsNonRoot"]
        assert template["spec"]["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
        context = container["securityContext"]
        assert context["readOnlyRootFilesystem"]
        assert not context["allowPrivilegeEscalation"]
        assert context["capabilities"]["drop"] == ["ALL"]
        assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
        assert "memory" in container["resources"]["limits"]
        assert {"startupProbe", "readinessProbe", "livenessProbe"} <= container.keys()


def test_devices_are_requested_as_many_as_there_are_ranks(manifests: Manifests) -> None:
    for _, container in _pods(manifests):
        resources = container["resources"]
        count = resources["limits"].get("nvidia.com/gpu")
        assert resources["requests"].get("nvidia.com/gpu") == count
        if count is not None:
            assert manifests.environment(container)["INSITU_TP"] == count


@pytest.mark.parametrize(
    ("program", "run"),
    [("insitu_scheduler", scheduler_main.run), ("insitu_shard", shard_main.run)],
)
def test_every_setting_is_a_flag_of_the_program(
    manifests: Manifests, program: str, run: Callable[..., None]
) -> None:
    app = typer.Typer()
    app.command()(run)
    known = {name for flag in typer.main.get_command(app).params for name in _variables(flag)}
    for _, container in _pods(manifests):
        if program in entry_point(container["image"]):
            names = manifests.environment(container).keys()
            assert {name for name in names if name.startswith("INSITU_")} <= known


def _variables(flag: Any) -> list[str]:
    found = flag.envvar
    return [found] if isinstance(found, str) else list(found or [])


def test_the_demo_starts_serves_and_drains_as_its_manifests_say(
    tmp_path: Path, demo_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifests = Manifests("cpu-demo")
    with Cluster(manifests, tmp_path) as cluster:
        cluster.start_all()
        for pod in cluster.pods.values():
            pod.wait_until_ready()
        monkeypatch.setenv("INSITU_ENDPOINT", cluster.endpoint)
        monkeypatch.setattr(CONFIG, "_api_key", "insitu-demo-key")
        expected = _next_token(LanguageModel(str(demo_folder)), remote=False)
        assert torch.equal(_next_token(LanguageModel(_MODEL), remote=True), expected)
        (shard,) = (pod for name, pod in cluster.pods.items() if "shard" in name)
        assert shard.delete() == 0
        # The StatefulSet starts it again, and the scheduler takes it back.
        again = cluster.start(manifests.named("StatefulSet", shard.name))
        again.wait_until_ready()
        assert torch.equal(_next_token(LanguageModel(_MODEL), remote=True), expected)
        for pod in cluster.pods.values():
            assert pod.delete() == 0


def _next_token(model: LanguageModel, *, remote: bool) -> torch.Tensor:
    with model.session(remote=remote):
        with model.trace("The Eiffel Tower is in the city of"):
            token: torch.Tensor = model.lm_head.output[0, -1].argmax(dim=-1).save()
    return token
