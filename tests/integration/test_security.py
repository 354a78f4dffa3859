"""Keys, limits and tokens on a real server of `insitu up`, and that nothing of them is seen."""

from __future__ import annotations

import json
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from typer.testing import CliRunner

from insitu import (
    CONFIG,
    CapacityError,
    Error,
    LanguageModel,
    PermissionDeniedError,
    UnavailableError,
    sessions,
)
from insitu._config import Config
from insitu.backends import remote
from insitu.backends.remote import RemoteBackend
from insitu_proto.v1 import shard_service_pb2, shard_service_pb2_grpc
from insitu_scheduler.keys import digest_of, read_keys
from insitu_scheduler.keys_command import app
from insitu_wire.error_codec import from_rpc_error
from insitu_wire.errors import AuthenticationError, Reason
from insitu_wire.tracing import Tracing
from support.spans import SpanReceiver
from support.tiny_models import TinyModels
from support.up import Up, insitu

IDS = [5, 9, 17, 23]


@dataclass
class Lab:
    up: Up
    keys_file: Path
    keys: dict[str, str]
    spans: SpanReceiver

    def insitu(self, *arguments: str, user: str = "ann") -> str:
        done = insitu(
            *arguments,
            INSITU_ENDPOINT=self.up.endpoint,
            INSITU_API_KEY=self.keys[user],
            COLUMNS="200",
        )
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr


def create(file: Path, *arguments: str) -> str:
    done = CliRunner().invoke(app, ["create", *arguments, "--file", str(file)])
    assert done.exit_code == 0, done.stderr
    key = done.stdout.strip()
    assert key.startswith("insitu_")
    assert key not in done.stderr
    return key


@pytest.fixture(scope="module")
def lab(tiny: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    folder = tmp_path_factory.mktemp("security")
    file = folder / "keys.json"
    bounds = ["max_kept_bytes=2000", "max_handle_bytes=1000"]
    limits = [flag for bound in bounds for flag in ("--limit", bound)]
    keys = {
        "ann": create(file, "ann"),
        "bob": create(file, "bob", *limits, "--model", "tiny/ll*"),
        "root": create(file, "root", "--role", "admin"),
    }
    models = [f"tiny/{family}={tiny.folder(family)}" for family in ("llama", "gpt2")]
    with pytest.MonkeyPatch.context() as environment, SpanReceiver() as spans:
        environment.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", spans.endpoint)
        environment.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        environment.setenv("INSITU_LOG_FORMAT", "json")
        with Up(folder / "data", models, ["--api-keys-file", str(file)]) as up:
            yield Lab(up, file, keys, spans)


@pytest.fixture
def model(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> LanguageModel:
    monkeypatch.setenv("INSITU_ENDPOINT", lab.up.endpoint)
    monkeypatch.setenv("INSITU_API_KEY", lab.keys["ann"])
    monkeypatch.setattr(CONFIG, "_api_key", None)
    return LanguageModel("tiny/llama")


def _run(model: LanguageModel) -> None:
    with model.trace(IDS, remote=True):
        model.lm_head.output.argmax(dim=-1).save()


def test_a_shard_group_takes_no_calls_but_its_schedulers(lab: Lab, model: LanguageModel) -> None:
    line = next(line for line in lab.up.log.splitlines() if "is served at" in line)
    address = json.loads(line)["message"].partition("is served at ")[2].split()[0]
    request = shard_service_pb2.DescribeModelRequest()
    with grpc.insecure_channel(address) as channel:
        stub = shard_service_pb2_grpc.ShardServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.DescribeModel(request)
        err = from_rpc_error(caught.value, address=address)  # type: ignore[arg-type]
    assert isinstance(err, AuthenticationError)
    _run(model)


def test_values_between_steps_are_bounded_by_the_key(
    lab: Lab, model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def two_traces() -> None:
        with model.session(remote=True):
            with model.trace(IDS):
                hidden = model.model.layers[0].output[0]  # 1,024 bytes
            with model.trace(IDS):
                model.model.layers[1].output[0][:] = hidden

    two_traces()
    monkeypatch.setenv("INSITU_API_KEY", lab.keys["bob"])
    with pytest.raises(CapacityError, match="may take at most 1,000") as caught:
        two_traces()
    assert caught.value.reason is Reason.LIMIT_EXCEEDED


def test_values_beyond_sessions_are_bounded_by_the_key(
    lab: Lab, model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INSITU_API_KEY", lab.keys["bob"])
    with pytest.raises(CapacityError, match="at most 2,000"):
        with model.session(remote=True):
            for _ in range(2):
                with model.trace(IDS):
                    model.model.layers[0].output[0].keep()


def test_a_model_that_the_key_is_not_for_is_refused(
    lab: Lab, model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INSITU_API_KEY", lab.keys["bob"])
    with pytest.raises(PermissionDeniedError, match=r"'tiny/gpt2', only for tiny/ll\*"):
        LanguageModel("tiny/gpt2").config  # noqa: B018 - asks the server


def test_nothing_secret_is_in_what_a_server_prints_counts_and_keeps(
    lab: Lab, model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = "insitu_0123456789ab_" + "5" * 64
    seen = lab.insitu("sessions")
    _run(model)
    for key in (wrong, lab.keys["bob"]):
        monkeypatch.setenv("INSITU_API_KEY", key)
        with pytest.raises(Error) as caught:
            with LanguageModel("tiny/gpt2").trace(IDS, remote=True):
                pass
        seen += f"{caught.value!r} {caught.value} {caught.value.metadata}"
    with urllib.request.urlopen(f"http://{lab.up.metrics_address}/metrics") as response:
        seen += response.read().decode()
    listed = insitu("keys", "list", INSITU_API_KEYS_FILE=str(lab.keys_file), COLUMNS="200")
    seen += listed.stdout + lab.up.log + str(lab.spans.spans)
    files = [path.read_bytes() for path in lab.up.data_dir.rglob("*") if path.is_file()]
    kept = b"".join(files) + lab.keys_file.read_bytes()
    for process in lab.up.descendants():
        seen += " ".join(process.cmdline())
    for key in (*lab.keys.values(), wrong):
        secret = key.rpartition("_")[2]
        assert secret not in seen
        assert secret.encode() not in kept
    tokens = [process.environ().get("INSITU_JOIN_TOKEN") for process in lab.up.descendants()]
    assert any(tokens)
    for token in filter(None, tokens):
        assert token not in seen
        assert token.encode() not in kept
    assert 'insitu_auth_failures_total{reason="INVALID_CREDENTIAL"}' in seen


def test_the_log_has_an_object_a_line_and_sessions_by_their_ids(
    lab: Lab, model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    _run(model)
    newest = sessions(1)[0]
    lines = [line for line in lab.up.log.splitlines() if line.startswith("{")]
    entries = [json.loads(line) for line in lines]
    assert all({"time", "level", "logger", "message"} <= entry.keys() for entry in entries)
    told = [entry["message"] for entry in entries if entry.get("session_id") == newest.id]
    assert any("is accepted" in message for message in told)
    assert any("has ended: COMPLETED" in message for message in told)


def test_a_session_is_one_trace_of_spans_from_the_client_to_the_shard(
    lab: Lab, model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_TRACING", Tracing("insitu-client"))
    _run(model)
    newest = sessions(1)[0]
    names = {"insitu.session", "insitu.submit", "insitu.queue", "insitu.run", "insitu.segment"}
    found = lab.spans.wait_for(lab.spans.trace_of(newest.id), names)
    parents = {
        "insitu.submit": "insitu.session",
        "insitu.queue": "insitu.submit",
        "insitu.run": "insitu.submit",
        "insitu.segment": "insitu.run",
    }
    for child, parent in parents.items():
        assert found[child][1].parent_span_id == found[parent][1].span_id
    assert {service for service, _ in found.values()} == {
        "insitu-client",
        "insitu-scheduler",
        "insitu-shard",
    }


def test_status_and_top_draw_groups_queues_and_ones_own_sessions(
    lab: Lab, model: LanguageModel
) -> None:
    _run(model)
    newest = sessions(1)[0]
    drawn = lab.insitu("top", "--count", "2", "--seconds", "0.1")
    assert drawn.count("as ann") >= 1
    for part in ("tiny/llama", "ready", "0 of 16", newest.id, "completed"):
        assert part in drawn
    err = insitu("top", "--all", INSITU_ENDPOINT=lab.up.endpoint, INSITU_API_KEY=lab.keys["ann"])
    assert err.returncode == 1
    assert "administrators" in err.stderr


def test_an_administrator_drains_the_server_and_a_user_may_not(
    lab: Lab, model: LanguageModel
) -> None:
    refused = insitu("drain", INSITU_ENDPOINT=lab.up.endpoint, INSITU_API_KEY=lab.keys["ann"])
    assert refused.returncode == 1
    assert "administrators" in refused.stderr
    assert "takes no new sessions" in lab.insitu("drain", user="root")
    with pytest.raises(UnavailableError, match="take no new sessions"):
        _run(model)
    assert "takes new sessions" in lab.insitu("drain", "--undo", user="root")
    _run(model)


def test_a_key_is_listed_by_its_id_and_revoked_while_the_server_runs(lab: Lab) -> None:
    file = str(lab.keys_file)
    lab.keys["eve"] = create(lab.keys_file, "eve", "--tier", "batch", "--expires-in-days", "30")
    key_id = lab.keys["eve"].split("_")[1]
    assert _until(lab, "eve", accepted=True)
    listed = insitu("keys", "list", INSITU_API_KEYS_FILE=file, COLUMNS="200").stdout
    row = next(line for line in listed.splitlines() if key_id in line)
    assert "eve" in row
    assert "batch" in row
    entry = next(
        key for key in json.loads(lab.keys_file.read_text())["keys"] if key["user"] == "eve"
    )
    assert entry["expires_at"]
    assert CliRunner().invoke(app, ["revoke", key_id, "--file", file]).exit_code == 0
    assert "was revoked" in _until(lab, "eve", accepted=False)
    again = insitu("keys", "revoke", "nobody", INSITU_API_KEYS_FILE=file)
    assert again.returncode == 1
    assert "has no key 'nobody'" in again.stderr


def _until(lab: Lab, user: str, *, accepted: bool) -> str:
    config = Config()
    config.set_default_endpoint(lab.up.endpoint)
    config.set_default_api_key(lab.keys[user])
    for _ in range(100):
        try:
            version = RemoteBackend(config).server_state().version
            if accepted:
                return version
        except AuthenticationError as err:
            if not accepted:
                return str(err)
        time.sleep(0.2)
    raise AssertionError("the file has changed, and nothing else")


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--role", "root"], "--role is root; it must be one of user, admin"),
        (["--tier", "gold"], "--tier is gold"),
        (["--weight", "0"], "--weight is 0"),
        (["--limit", "max_tokens=many"], "NAME=NUMBER"),
        (["--limit", "max_moons=3"], "the limit 'max_moons'"),
    ],
)
def test_a_key_that_can_not_be_is_not_made(tmp_path: Path, flags: list[str], problem: str) -> None:
    done = CliRunner().invoke(app, ["create", "ann", "--file", str(tmp_path / "k"), *flags])
    assert problem in str(done.exception)
    assert not (tmp_path / "k").exists()


def test_a_file_of_plain_keys_becomes_one_of_hashes(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("ann:in-plain\n")
    assert CliRunner().invoke(app, ["create", "bob", "--file", str(file)]).exit_code == 0
    assert "in-plain" not in file.read_text()
    assert {key.user: key.digest for key in read_keys(file)}["ann"] == digest_of("in-plain")
