"""What a user can get wrong against a real server, each with its own clear error."""

from __future__ import annotations

import uuid
from pathlib import Path

import grpc
import pytest

from insitu import (
    CONFIG,
    AuthenticationError,
    CapacityError,
    InvalidTraceError,
    LanguageModel,
    NotFoundError,
    SessionStateError,
    UnavailableError,
    UnknownModuleError,
)
from insitu.backends import remote
from insitu_proto.v1 import (
    scheduler_service_pb2,
    scheduler_service_pb2_grpc,
    session_pb2,
    trace_pb2,
)
from insitu_wire.error_codec import from_rpc_error
from insitu_wire.errors import Error
from insitu_wire.limits import MAX_SESSION_BYTES
from support.tiny_models import TinyModels
from support.up import Up

IDS = [5, 9, 17, 23]
KEY = "a-secret-of-ada"


@pytest.fixture(scope="module")
def up(tiny: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Up:
    folder = tmp_path_factory.mktemp("up")
    keys = folder / "keys"
    keys.write_text(f"# users of this lab\nada:{KEY}\nbob:a-secret-of-bob\n")
    models = [f"tiny/llama={tiny.folder('llama')}"]
    with Up(folder / "data", models, ["--api-keys-file", str(keys)]) as server:
        yield server


@pytest.fixture(autouse=True)
def _client(up: Up, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSITU_ENDPOINT", up.endpoint)
    monkeypatch.setenv("INSITU_API_KEY", KEY)
    monkeypatch.setattr(CONFIG, "_api_key", None)
    monkeypatch.setattr(CONFIG, "_endpoint", None)


@pytest.fixture
def stub(up: Up) -> scheduler_service_pb2_grpc.SchedulerServiceStub:
    with grpc.insecure_channel(up.endpoint) as channel:
        yield scheduler_service_pb2_grpc.SchedulerServiceStub(channel)


def _submit(
    stub: scheduler_service_pb2_grpc.SchedulerServiceStub,
    session: session_pb2.Session,
    request_id: str | None = None,
) -> str:
    """Submits what the SDK would never send."""
    request = scheduler_service_pb2.SubmitSessionRequest(
        request_id=request_id or str(uuid.uuid4()), session=session, is_detached=True
    )
    try:
        return stub.SubmitSession(request, metadata=(("insitu-api-key", KEY),)).session_id
    except grpc.RpcError as rpc_error:
        raise from_rpc_error(rpc_error, address="test") from None  # type: ignore[arg-type]


def _session() -> tuple[session_pb2.Session, trace_pb2.Trace]:
    session = session_pb2.Session()
    trace = session.steps.add().trace
    trace.model = "tiny/llama"
    trace.mode = trace_pb2.TRACE_MODE_FORWARD
    trace.invokes.add().rows.add(token_ids=IDS)
    return session, trace


def test_an_unknown_model_lists_those_served() -> None:
    with pytest.raises(NotFoundError, match=r"'gpt-5'.*tiny/llama"):
        with LanguageModel("gpt-5").trace(IDS, remote=True):
            pass


def test_an_unknown_module_path_is_an_error_before_anything_is_sent() -> None:
    model = LanguageModel("tiny/llama")
    with pytest.raises(UnknownModuleError, match=r"model\.layers\.0\.mlp"):
        with model.trace(IDS, remote=True):
            model.model.layers[0].mpl.output.save()


def test_a_missing_key_says_how_to_set_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("INSITU_API_KEY")
    with pytest.raises(AuthenticationError, match="INSITU_API_KEY"):
        with LanguageModel("tiny/llama").trace(IDS, remote=True):
            pass


def test_a_wrong_key_is_refused_and_never_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSITU_API_KEY", "not-a-key-of-anybody")
    with pytest.raises(AuthenticationError) as raised:
        with LanguageModel("tiny/llama").trace(IDS, remote=True):
            pass
    assert raised.value.reason == "INVALID_CREDENTIAL"
    assert "not-a-key-of-anybody" not in str(raised.value)


def test_no_key_reaches_the_log(up: Up) -> None:
    assert KEY not in up.log
    assert "not-a-key-of-anybody" not in up.log


def test_a_server_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSITU_ENDPOINT", "127.0.0.1:1")
    with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:1"):
        with LanguageModel("tiny/llama").trace(IDS, remote=True):
            pass


def test_an_operation_outside_the_list_is_refused_by_the_server(
    stub: scheduler_service_pb2_grpc.SchedulerServiceStub,
) -> None:
    session, trace = _session()
    trace.nodes.add(id=1).call.name = "torch.load"
    with pytest.raises(InvalidTraceError) as raised:
        _submit(stub, session)
    assert raised.value.reason == "UNKNOWN_OPERATION"
    assert "torch.load" in str(raised.value)


@pytest.mark.parametrize("node_id", [2, 3, 99])
def test_a_reference_to_what_does_not_come_before_is_refused(
    stub: scheduler_service_pb2_grpc.SchedulerServiceStub, node_id: int
) -> None:
    session, trace = _session()
    point = trace.nodes.add(id=1).read.hook_point
    point.module_path, point.side = "lm_head", 3
    trace.nodes.add(id=2).save.value.reference.node_id = node_id
    later = trace.nodes.add(id=3).read.hook_point
    later.CopyFrom(point)
    with pytest.raises(InvalidTraceError) as raised:
        _submit(stub, session)
    assert raised.value.reason == "UNKNOWN_REFERENCE"
    assert str(node_id) in str(raised.value)


def test_an_unknown_module_path_is_refused_by_the_server(
    stub: scheduler_service_pb2_grpc.SchedulerServiceStub,
) -> None:
    session, trace = _session()
    point = trace.nodes.add(id=1).read.hook_point
    point.module_path, point.side = "model.layers.7", 3
    with pytest.raises(UnknownModuleError, match=r"model\.layers\.7.*model\.layers\.\d"):
        _submit(stub, session)


def test_a_shape_that_does_not_fit_a_write_fails_at_the_users_line_where_the_model_runs() -> None:
    model = LanguageModel("tiny/llama")
    with pytest.raises(InvalidTraceError) as raised:
        with model.trace(IDS, remote=True):
            first = model.model.layers[0].output[0]
            odd = first[first > 0]
            model.model.layers[1].output[0][:, -1, :] = odd
    assert raised.value.reason == "SHAPE_MISMATCH"
    assert raised.value.trace_number == 1
    assert raised.value.location is not None
    assert raised.value.location.source == "model.model.layers[1].output[0][:, -1, :] = odd"


def test_a_session_over_the_size_limit_is_refused_with_both_sizes() -> None:
    model = LanguageModel("tiny/llama")
    with pytest.raises(CapacityError, match=r"[\d,]{10} bytes .*[\d,]{10}") as raised:
        with model.session(remote=True) as session:
            session.log("x" * MAX_SESSION_BYTES)
    assert raised.value.reason == "REQUEST_TOO_LARGE"


def test_a_session_just_over_the_servers_own_limit_is_refused_by_the_server(
    stub: scheduler_service_pb2_grpc.SchedulerServiceStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "MAX_SESSION_BYTES", 2**40)
    model = LanguageModel("tiny/llama")
    with pytest.raises(Error) as raised:
        with model.session(remote=True) as session:
            session.log("x" * MAX_SESSION_BYTES)
    assert raised.value.reason == "REQUEST_TOO_LARGE"


def test_a_request_id_sent_twice_is_answered_once(
    stub: scheduler_service_pb2_grpc.SchedulerServiceStub,
) -> None:
    session, _ = _session()
    request_id = str(uuid.uuid4())
    assert _submit(stub, session, request_id) == _submit(stub, session, request_id)
    other, trace = _session()
    trace.invokes[0].rows[0].token_ids.append(1)
    with pytest.raises(SessionStateError) as raised:
        _submit(stub, other, request_id)
    assert raised.value.reason == "REQUEST_ID_REUSED"


def test_a_server_on_every_address_needs_a_key_file(tmp_path: Path) -> None:
    from support.up import insitu

    done = insitu("scheduler", "--host", "0.0.0.0", "--port", "0", "--data-dir", str(tmp_path))
    assert done.returncode == 1
    assert "--api-keys-file" in done.stderr
    assert "Traceback" not in done.stderr
