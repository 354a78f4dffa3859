"""The manifests of two schedulers, as processes: over a real PostgreSQL and an S3 server."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import boto3
import pytest
import torch
from moto.server import ThreadedMotoServer

from insitu import CONFIG, LanguageModel
from support import postgres
from support.cluster import ONE_CPU_RANK, Cluster
from support.manifests import HAS_KUBECTL, Manifests

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.manifests import Pod
    from support.tiny_models import TinyModels

pytestmark = [
    pytest.mark.skipif(not HAS_KUBECTL, reason="kubectl, which renders them, is not here"),
    pytest.mark.skipif(postgres.BINARIES is None, reason=postgres.MISSING),
]
_BUCKET = "results"


@pytest.fixture
def s3() -> Iterator[dict[str, str]]:
    """The secret of an object store with an empty bucket."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    secret = {
        "AWS_ACCESS_KEY_ID": "tests",
        "AWS_SECRET_ACCESS_KEY": "tests",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
    }
    _store(secret).create_bucket(Bucket=_BUCKET)
    yield secret | {"url": f"s3://{_BUCKET}/insitu"}
    server.stop()


def _store(secret: dict[str, str]) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=secret["AWS_ENDPOINT_URL"],
        region_name=secret["AWS_DEFAULT_REGION"],
        aws_access_key_id="tests",
        aws_secret_access_key="tests",
    )


@pytest.mark.timeout(300)
def test_when_the_scheduler_that_leads_is_killed_the_other_serves_what_was_accepted(
    tmp_path: Path, tiny: TinyModels, s3: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifests = Manifests("ha")
    with postgres.running() as journal:
        secrets = {
            "insitu-api-keys": {"api-keys": "ann:ann-key\n"},
            "insitu-join-token": {"token": "only for tests"},
            "insitu-journal": {"url": journal},
            "insitu-results": s3,
        }
        with Cluster(manifests, tmp_path, secrets=secrets) as cluster:
            scheduler = manifests.named("StatefulSet", "insitu-scheduler")
            first = cluster.start(scheduler, 0)
            first.wait_until_ready()
            second = cluster.start(scheduler, 1)
            second.wait_until_started()
            assert not second.is_ready()
            shard = manifests.named("StatefulSet", "insitu-shard-llama-70b")
            model_flag = f"tiny/llama={tiny.folder('llama')}"
            cluster.start(shard, INSITU_MODEL=model_flag, **ONE_CPU_RANK).wait_until_ready()
            monkeypatch.setenv("INSITU_ENDPOINT", cluster.endpoint)
            monkeypatch.setattr(CONFIG, "_api_key", "ann-key")
            local = LanguageModel(str(tiny.folder("llama")))
            _wait_until_registered(first)
            model = LanguageModel("tiny/llama")
            assert torch.equal(_logits(model, remote=True), _logits(local, remote=False))
            # What users save is in the object store.
            kept = _store(s3).list_objects_v2(Bucket=_BUCKET)["Contents"]
            assert all(found["Key"].startswith("insitu/") for found in kept)
            with model.session(remote=True, blocking=False) as session:
                with model.trace([5, 9, 17]):
                    logits = model.lm_head.output.save()
            first.process.kill()
            first.process.wait(30)
            second.wait_until_ready()
            session.submission.result(timeout=120)
            assert torch.equal(logits, _logits(local, remote=False))
            # Kubernetes starts it again, and it stands by.
            again = cluster.start(scheduler, 0)
            again.wait_until_started()
            assert not again.is_ready()
            assert again.is_alive()


def _wait_until_registered(scheduler: Pod) -> None:
    deadline = time.monotonic() + 60
    while "serves tiny/llama at" not in scheduler.log:
        assert time.monotonic() < deadline, scheduler.log
        time.sleep(0.1)


def _logits(model: LanguageModel, *, remote: bool) -> torch.Tensor:
    with model.trace([5, 9, 17], remote=remote):
        logits: torch.Tensor = model.lm_head.output.save()
    return logits
