from __future__ import annotations

import pickle
import traceback

import grpc
import pytest

from insitu_proto.v1 import error_reason_pb2
from insitu_wire.error_codec import DOMAIN, from_failure, from_rpc_error, to_failure, to_status
from insitu_wire.errors import Error, Location, Reason, UnavailableError, error, status_code


def test_every_reason_of_the_contract_has_a_code_and_an_exception() -> None:
    contract = {name.removeprefix("ERROR_REASON_") for name in error_reason_pb2.ErrorReason.keys()}  # noqa: SIM118
    assert set(Reason) == contract - {"UNSPECIFIED"}
    for reason in Reason:
        assert status_code(reason) is not None
        assert isinstance(error(reason, "text"), Error)


def test_an_unknown_module_is_also_an_attribute_error() -> None:
    assert isinstance(error(Reason.UNKNOWN_MODULE_PATH, "text"), AttributeError)


def test_a_failure_survives_the_wire() -> None:
    sent = error(
        Reason.SHAPE_MISMATCH,
        "does not fit",
        location=Location("cell.py", 7, "x[0] = y"),
        trace_number=2,
        remote_traceback="RuntimeError: no",
        expected=[1, 2],
    )
    sent.metadata["message"] = "any key may come"
    received = from_failure(to_failure(sent))
    assert type(received) is type(sent)
    assert str(received) == str(sent)
    assert received.metadata == {"expected": "[1, 2]", "message": "any key may come"}


def test_an_error_crosses_to_another_process_as_it_is() -> None:
    sent = error(
        Reason.UNKNOWN_MODULE_PATH,
        "no such module",
        location=Location("cell.py", 7, "x[0] = y"),
        trace_number=2,
        retry_after_seconds=1.5,
        path="model.layer",
    )
    received = pickle.loads(pickle.dumps(sent))
    assert type(received) is type(sent)
    assert vars(received) == vars(sent)
    assert str(received) == str(sent)


def test_a_status_carries_reason_domain_and_every_dynamic_part() -> None:
    from google.rpc import error_details_pb2

    status = to_status(error(Reason.QUEUE_FULL, "full", limit=3))
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert (info.reason, info.domain, dict(info.metadata)) == ("QUEUE_FULL", DOMAIN, {"limit": "3"})


@pytest.mark.parametrize("part", ["does not fit", "trace 2", "cell.py:7", "x[0] = y"])
def test_the_text_of_an_error_names_the_users_line(part: str) -> None:
    err = error(
        Reason.SHAPE_MISMATCH,
        "does not fit",
        location=Location("cell.py", 7, "x[0] = y"),
        trace_number=2,
    )
    assert part in str(err)


def test_the_page_of_an_error_stands_below_its_traceback_and_not_in_its_text() -> None:
    err = error(Reason.SHAPE_MISMATCH, "does not fit")
    assert str(err) == "does not fit"
    assert traceback.format_exception_only(err)[-1] == (
        "[SHAPE_MISMATCH] see docs/errors/SHAPE_MISMATCH.md\n"
    )


@pytest.mark.parametrize("code", ["UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED"])
def test_a_call_that_the_server_did_not_answer_itself_may_be_made_again(code: str) -> None:
    # A server that is told to stop has gRPC end its calls as CANCELLED.
    unanswered = grpc.aio.AioRpcError(
        grpc.StatusCode[code], grpc.aio.Metadata(), grpc.aio.Metadata(), details=""
    )
    assert isinstance(from_rpc_error(unanswered, address="127.0.0.1:1"), UnavailableError)
