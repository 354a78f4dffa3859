"""The manifests with certificates, as processes: those of cert-manager's names and files."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest
import torch
import trustme

from insitu import CONFIG, LanguageModel, UnavailableError
from support.cluster import ONE_CPU_RANK, Cluster
from support.manifests import HAS_KUBECTL, Manifests

if TYPE_CHECKING:
    from pathlib import Path

    from support.manifests import Pod
    from support.tiny_models import TinyModels

pytestmark = pytest.mark.skipif(not HAS_KUBECTL, reason="kubectl, which renders them, is not here")


def _secrets(manifests: Manifests, *more: str) -> dict[str, dict[str, str]]:
    """Makes what cert-manager makes of the Certificates.

    Args:
        manifests: those with the Certificates.
        more: names of the scheduler that an administrator has added.
    """
    authority = trustme.CA()
    secrets = {"insitu-ca": {"tls.crt": authority.cert_pem.bytes().decode()}}
    for certificate in manifests.of("Certificate"):
        spec: dict[str, Any] = certificate["spec"]
        if spec.get("isCA"):
            continue
        names = [*spec["dnsNames"], *(more if "localhost" in spec["dnsNames"] else ())]
        issued = authority.issue_cert(*names)
        secrets[spec["secretName"]] = {
            "tls.crt": b"".join(blob.bytes() for blob in issued.cert_chain_pems).decode(),
            "tls.key": issued.private_key_pem.bytes().decode(),
            "ca.crt": authority.cert_pem.bytes().decode(),
        }
    return secrets


def test_a_session_runs_with_certificates_and_the_probes_pass_without(
    tmp_path: Path, tiny: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    with _cluster("gpu-tls", tmp_path) as cluster:
        scheduler = _start_scheduler(cluster)
        shard = cluster.manifests.named("StatefulSet", "insitu-shard-llama-70b")
        model = f"tiny/llama={tiny.folder('llama')}"
        cluster.start(shard, INSITU_MODEL=model, **ONE_CPU_RANK).wait_until_ready()
        _wait_until_registered(scheduler)
        monkeypatch.setenv("INSITU_ENDPOINT", cluster.endpoint)
        monkeypatch.setattr(CONFIG, "_api_key", "ann-key")
        with pytest.raises(UnavailableError):
            _logits(LanguageModel("tiny/llama"), remote=True)
        monkeypatch.setenv("INSITU_TLS_CA", str(tmp_path / "ca.pem"))
        expected = _logits(LanguageModel(str(tiny.folder("llama"))), remote=False)
        assert torch.equal(_logits(LanguageModel("tiny/llama"), remote=True), expected)


def test_a_group_over_two_nodes_registers_with_certificates(
    tmp_path: Path, tiny: TinyModels
) -> None:
    with _cluster("gpu-wide-tls", tmp_path) as cluster:
        scheduler = _start_scheduler(cluster)
        leader, follower = cluster.start_wide_group(f"tiny/llama={tiny.folder('llama')}")
        leader.wait_until_ready()
        _wait_until_registered(scheduler)
        follower.terminate()
        assert leader.delete() == 0
        assert follower.process.wait(60) == 0


def _cluster(overlay: str, folder: Path) -> Cluster:
    manifests = Manifests(overlay)
    secrets = _secrets(manifests, "127.0.0.1")
    (folder / "ca.pem").write_text(secrets["insitu-ca"]["tls.crt"])
    secrets["insitu-api-keys"] = {"api-keys": "ann:ann-key\n"}
    return Cluster(manifests, folder, secrets=secrets)


def _start_scheduler(cluster: Cluster) -> Pod:
    scheduler = cluster.start(cluster.manifests.named("StatefulSet", "insitu-scheduler"))
    scheduler.wait_until_ready()
    return scheduler


def _wait_until_registered(scheduler: Pod) -> None:
    deadline = time.monotonic() + 60
    while "serves tiny/llama at" not in scheduler.log:
        assert time.monotonic() < deadline, scheduler.log
        time.sleep(0.1)


def _logits(model: LanguageModel, *, remote: bool) -> torch.Tensor:
    with model.trace([5, 9, 17], remote=remote):
        logits: torch.Tensor = model.lm_head.output.save()
    return logits
