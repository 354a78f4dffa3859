"""The Kubernetes manifests: they render, hold together, and what they start runs."""

from __future__ import annotations

import json
import os
import time
from typing import TYPE_CHECKING, Any

import kubernetes_validate
import pytest
import torch
import typer

import insitu_scheduler.__main__ as scheduler_main
import insitu_shard.__main__ as shard_main
from insitu import CONFIG, LanguageModel, NotFoundError
from support.cluster import Cluster
from support.manifests import DEPLOY, HAS_KUBECTL, OVERLAYS, Manifests, entry_point

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from insitu import Session
    from support.tiny_models import TinyModels

pytestmark = pytest.mark.skipif(not HAS_KUBECTL, reason="kubectl, which renders them, is not here")

# Of operators that a cluster may have: their schemas are not Kubernetes' own.
_FOREIGN = {
    "Certificate", "Issuer", "LeaderWorkerSet", "PodMonitor", "PrometheusRule", "ScaledObject",
}  # fmt: skip
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
    ports = {
        port["name"] for _, container in _pods(manifests) for port in container.get("ports", [])
    }
    for service in manifests.of("Service"):
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
    for policy in manifests.of("NetworkPolicy"):
        for rule in policy["spec"].get("ingress", []):
            assert {port["port"] for port in rule.get("ports", [])} <= ports


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
        assert template["spec"]["terminationGracePeriodSeconds"] > _grace_seconds(
            manifests, container
        )
        component = template["metadata"]["labels"]["app.kubernetes.io/component"]
        # Nobody calls those that follow a leader.
        if component != "shard-follower":
            assert {"startupProbe", "readinessProbe", "livenessProbe"} <= container.keys()
            assert "preStop" in container["lifecycle"]
            token = _join_token(container)
            assert token == {"name": "insitu-join-token", "key": "token", "optional": True}


def _join_token(container: dict[str, Any]) -> dict[str, Any]:
    (entry,) = (entry for entry in container["env"] if entry["name"] == "INSITU_JOIN_TOKEN")
    found: dict[str, Any] = entry["valueFrom"]["secretKeyRef"]
    return found


def _grace_seconds(manifests: Manifests, container: dict[str, Any]) -> float:
    found = manifests.environment(container)
    return float(found.get("INSITU_SHARD_GRACE_SECONDS") or found["INSITU_GRACE_SECONDS"])


def test_the_node_of_the_scheduler_that_leads_can_be_drained(manifests: Manifests) -> None:
    replicas = manifests.named("StatefulSet", "insitu-scheduler")["spec"]["replicas"]
    budget = manifests.named("PodDisruptionBudget", "insitu-scheduler")["spec"]
    # It alone is ready: those that stand by are not, and count as disrupted.
    assert replicas - budget["maxUnavailable"] < 1


def test_uploads_take_less_than_half_of_the_volume(manifests: Manifests) -> None:
    scheduler = manifests.named("StatefulSet", "insitu-scheduler")["spec"]
    (container,) = scheduler["template"]["spec"]["containers"]
    claims = scheduler.get("volumeClaimTemplates") or [
        manifests.named("PersistentVolumeClaim", "insitu-scheduler")
    ]
    storage = claims[0]["spec"]["resources"]["requests"]["storage"]
    bound = int(manifests.environment(container)["INSITU_UPLOAD_STORE_BYTES"])
    assert bound < int(storage.removesuffix("Gi")) * 1024**3 / 2


def test_what_sessions_may_take_fits_the_memory_of_the_demo() -> None:
    manifests = Manifests("cpu-demo")
    shard = manifests.named("StatefulSet", "insitu-shard-smollm2")
    (container,) = shard["spec"]["template"]["spec"]["containers"]
    found = manifests.environment(container)
    budgets = ("MAX_PASS", "MAX_GRAPH", "UPLOAD_CACHE", "KEPT", "HANDLE")
    taken = sum(int(found[f"INSITU_{name}_BYTES"]) for name in budgets)
    limit = container["resources"]["limits"]["memory"]
    # The rest is for the model and its program.
    assert taken <= (int(limit.removesuffix("Gi")) - 2) * 1024**3


def test_with_private_metrics_prometheus_alone_reaches_them(tmp_path: Path) -> None:
    deploy = os.path.relpath(DEPLOY / "k8s", tmp_path)
    overlay = {
        "namespace": "insitu",
        "resources": [f"{deploy}/base"],
        "components": [f"{deploy}/components/private-metrics"],
    }
    (tmp_path / "kustomization.yaml").write_text(json.dumps(overlay))
    policies = Manifests(str(tmp_path)).of("NetworkPolicy")
    callers = {
        port["port"]: rule.get("from")
        for policy in policies
        for rule in policy["spec"].get("ingress", [])
        if policy["metadata"]["name"] == "insitu-scheduler"
        for port in rule["ports"]
    }
    monitoring = {"namespaceSelector": {"matchLabels": {"insitu.dev/monitoring": "true"}}}
    assert callers == {"grpc": None, "metrics": [monitoring]}


def test_every_scaled_object_asks_for_a_model_that_a_group_serves(manifests: Manifests) -> None:
    names = {
        manifests.environment(container).get("INSITU_MODEL", "").partition("=")[0]
        for _, container in _pods(manifests)
    }
    for scaled in manifests.of("ScaledObject"):
        (trigger,) = scaled["spec"]["triggers"]
        assert trigger["metadata"]["query"].split('"')[1] in names
        target = manifests.named("StatefulSet", scaled["spec"]["scaleTargetRef"]["name"])
        # A number here would undo with each apply what the autoscaler has set.
        assert "replicas" not in target["spec"]


def test_devices_are_requested_as_many_as_there_are_ranks(manifests: Manifests) -> None:
    for _, container in _pods(manifests):
        resources = container["resources"]
        count = resources["limits"].get("nvidia.com/gpu")
        assert resources["requests"].get("nvidia.com/gpu") == count
        if count is not None:
            num_ranks = int(manifests.environment(container)["INSITU_TP"])
            assert int(count) * _num_nodes(manifests) == num_ranks


def _num_nodes(manifests: Manifests) -> int:
    wide = manifests.of("LeaderWorkerSet")
    return wide[0]["spec"]["leaderWorkerTemplate"]["size"] if wide else 1


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
        expected = _first_session(LanguageModel(str(demo_folder)), remote=False)
        assert _first_session(LanguageModel(_MODEL), remote=True) == expected
        with pytest.raises(NotFoundError, match=_MODEL):
            _first_session(LanguageModel("no/overlay-defines-it"), remote=True)
        (shard,) = (pod for name, pod in cluster.pods.items() if "shard" in name)
        session = _long_session(LanguageModel(_MODEL))
        shard.terminate()
        # The one group there is takes nothing new, and ends after the session that it runs.
        session.submission.result(timeout=60)
        assert shard.process.wait(60) == 0
        # The StatefulSet starts it again, and the scheduler takes it back.
        again = cluster.start(manifests.named("StatefulSet", shard.name))
        again.wait_until_ready()
        assert _first_session(_served(_MODEL), remote=True) == expected
        for pod in cluster.pods.values():
            assert pod.delete() == 0


def test_a_group_wider_than_a_node_serves_as_its_manifest_says(
    tmp_path: Path, tiny: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifests = Manifests("gpu-wide")
    secrets = {"insitu-api-keys": {"api-keys": "ann:ann-key\n"}}
    with Cluster(manifests, tmp_path, secrets=secrets) as cluster:
        cluster.start(manifests.named("StatefulSet", "insitu-scheduler")).wait_until_ready()
        leader, follower = cluster.start_wide_group(f"tiny/llama={tiny.folder('llama')}")
        leader.wait_until_ready()
        monkeypatch.setenv("INSITU_ENDPOINT", cluster.endpoint)
        monkeypatch.setattr(CONFIG, "_api_key", "ann-key")
        found = _top_token(_served("tiny/llama"), remote=True)
        expected = _top_token(LanguageModel(str(tiny.folder("llama"))), remote=False)
        assert torch.equal(found, expected)
        # All pods of a group are told to end at the same time; the leader ends the others.
        follower.terminate()
        assert leader.delete() == 0
        assert follower.process.wait(60) == 0


def test_a_missing_secret_is_an_exit_status_and_a_line_that_names_the_file(tmp_path: Path) -> None:
    manifests = Manifests("gpu")
    with Cluster(manifests, tmp_path) as cluster:
        pod = cluster.start(manifests.named("StatefulSet", "insitu-scheduler"))
        assert pod.process.wait(60) == 1
    last = pod.log.splitlines()[-1]
    assert last.startswith("insitu scheduler: the key file")
    assert "/etc/insitu/keys/api-keys" in last


def test_a_volume_without_the_model_is_an_exit_status_and_a_line_that_names_the_folder(
    tmp_path: Path,
) -> None:
    manifests = Manifests("gpu")
    with Cluster(manifests, tmp_path) as cluster:
        pod = cluster.start(manifests.named("StatefulSet", "insitu-shard-llama-70b"))
        assert pod.process.wait(120) == 1
    last = pod.log.splitlines()[-1]
    assert last.startswith("insitu shard:")
    assert "/models/Meta-Llama-3.1-70B" in last


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_pod_that_shows_no_gpu_is_an_exit_status_and_a_line_that_says_why(
    tmp_path: Path, tiny: TinyModels
) -> None:
    manifests = Manifests("gpu")
    with Cluster(manifests, tmp_path) as cluster:
        workload = manifests.named("StatefulSet", "insitu-shard-llama-70b")
        pod = cluster.start(
            workload, INSITU_MODEL=f"tiny/llama={tiny.folder('llama')}", INSITU_TP="1"
        )
        assert pod.process.wait(120) == 1
    last = pod.log.splitlines()[-1]
    assert last.startswith("insitu shard: --require-gpus is set, and this machine shows no GPU")


def test_a_group_without_its_scheduler_says_so_keeps_trying_and_ends_when_told(
    tmp_path: Path, tiny: TinyModels
) -> None:
    manifests = Manifests("cpu-demo")
    with Cluster(manifests, tmp_path) as cluster:
        workload = manifests.named("StatefulSet", "insitu-shard-smollm2")
        pod = cluster.start(workload, INSITU_MODEL=f"tiny/llama={tiny.folder('llama')}")
        pod.wait_until_ready()
        deadline = time.monotonic() + 30
        while "does not keep us registered" not in pod.log:
            assert time.monotonic() < deadline, pod.log
            time.sleep(0.1)
        assert pod.process.poll() is None
        assert f"the scheduler at {cluster.endpoint}" in pod.log
        assert pod.delete() == 0


def _long_session(model: LanguageModel) -> Session:
    """Gives a session that runs, and will for a while."""
    with model.session(remote=True, blocking=False, exact=True) as session:
        for number in range(30):
            with model.trace(f"The Eiffel Tower, number {number}, is in"):
                model.lm_head.output[0, -1].argmax(dim=-1).save()
    deadline = time.monotonic() + 60
    while session.submission.status() != "RUNNING":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return session


def _served(name: str) -> LanguageModel:
    """Gives a model once its group, which is ready, has registered with the scheduler, too."""
    model = LanguageModel(name)
    deadline = time.monotonic() + 30
    while True:
        try:
            assert model.config
        except NotFoundError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        else:
            return model


def _top_token(model: LanguageModel, *, remote: bool) -> torch.Tensor:
    with model.trace([5, 9, 17], remote=remote):
        token: torch.Tensor = model.lm_head.output[0, -1].argmax(dim=-1).save()
    return token


def _first_session(model: LanguageModel, *, remote: bool) -> list[list[list[int]]]:
    """The session of the README: the tokens that both traces predict."""
    with model.session(remote=remote):
        with model.trace("The Eiffel Tower is in the city of"):
            hidden = model.model.layers[29].output[0][:, -1, :]
            first = model.lm_head.output.argmax(dim=-1).save()
        with model.trace("Buckingham Palace is in the city of"):
            model.model.layers[1].output[0][:, -1, :] = hidden[:]
            second = model.lm_head.output.argmax(dim=-1).save()
    return [first.tolist(), second.tolist()]
