"""The status table, over the whole exception tree and back."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest
from google.rpc import error_details_pb2  # type: ignore[import-untyped]
from loramux import errors
from loramux.rpc import status

EXAMPLES = [
    errors.InvalidRequest("sampling.n", "must be in [1, 16], got 99", metadata={"limit": 16}),
    errors.InvalidAdapter("r", "does not fit the tensors", reason="RANK_MISMATCH"),
    errors.AdapterUnavailable("adapter 'a' failed to load: no file", metadata={"adapter": "a"}),
    errors.AdapterNotFound("nobody"),
    errors.UnknownService("this port does not serve 'x'"),
    errors.AdapterExists("adapter 'a' is loaded with other content", metadata={"adapter": "a"}),
    errors.FolderExists("out exists already", metadata={"path": "/merged/out"}),
    errors.PathNotAllowed("/etc is outside the adapter roots"),
    errors.WrongScope("this token is not for the admin port"),
    errors.Unauthenticated("the token is wrong", reason="TOKEN_INVALID"),
    errors.Overloaded("the queue is full", retry_after=2.5, reason="QUEUE_FULL"),
    errors.Overloaded("the disk is full", retry_after=None, reason="DISK_FULL"),
    errors.SlowReader("the client did not read for 30 s"),
    errors.DeadlineExceeded("the deadline passed while it waited"),
    errors.Cancelled("an operator cancelled it"),
    errors.Draining("the server is shutting down", retry_after=0.25),
    errors.Unimplemented("not yet"),
    errors.EngineFault("the engine failed"),
]
# By reason: the status, and the detail beside ErrorInfo. RetryInfo is there where trying again may help, only there:
# clients and proxies repeat such requests by themselves.
CONTRACT = {
    "INVALID_VALUE": ("INVALID_ARGUMENT", "BadRequest"),
    "RANK_MISMATCH": ("INVALID_ARGUMENT", "PreconditionFailure"),
    "ADAPTER_UNAVAILABLE": ("FAILED_PRECONDITION", "PreconditionFailure"),
    "ADAPTER_NOT_FOUND": ("NOT_FOUND", "ResourceInfo"),
    "UNKNOWN_SERVICE": ("NOT_FOUND", None),
    "ADAPTER_EXISTS": ("ALREADY_EXISTS", None),
    "FOLDER_EXISTS": ("ALREADY_EXISTS", None),
    "PATH_NOT_ALLOWED": ("PERMISSION_DENIED", None),
    "WRONG_SCOPE": ("PERMISSION_DENIED", None),
    "TOKEN_INVALID": ("UNAUTHENTICATED", None),
    "QUEUE_FULL": ("RESOURCE_EXHAUSTED", "RetryInfo"),
    "DISK_FULL": ("RESOURCE_EXHAUSTED", None),
    "SLOW_READER": ("ABORTED", None),
    "DEADLINE_EXCEEDED": ("DEADLINE_EXCEEDED", None),
    "CANCELLED": ("CANCELLED", None),
    "DRAINING": ("UNAVAILABLE", "RetryInfo"),
    "UNIMPLEMENTED": ("UNIMPLEMENTED", None),
    "ENGINE_FAULT": ("INTERNAL", None),
}


def tree(kind: type[errors.LoramuxError] = errors.LoramuxError) -> Iterator[type[errors.LoramuxError]]:
    for child in kind.__subclasses__():
        yield child
        yield from tree(child)


def names(rich: object) -> list[str]:
    return [packed.type_url.rsplit(".", 1)[1] for packed in rich.details]  # type: ignore[attr-defined]


def test_every_error_has_an_example() -> None:
    """A class that is added to the tree must say here what it is on the wire."""
    never_sent = {errors.StartupError, errors.TooLittleMemory, errors.UnsupportedModel, errors.Unreachable}
    assert {type(error) for error in EXAMPLES} == set(tree()) - never_sent


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda e: e.reason)
def test_to_the_wire_and_back(error: errors.LoramuxError) -> None:
    rich = status.from_error(error)
    code, detail = CONTRACT[error.reason]
    assert status.code_of(rich).name == error.status == code
    assert rich.message == error.message
    assert names(rich) == ["ErrorInfo", *([detail] if detail else [])]
    info = error_details_pb2.ErrorInfo()
    rich.details[0].Unpack(info)
    assert (info.reason, info.domain, dict(info.metadata)) == (error.reason, "loramux", error.metadata)

    again = status.to_error(status.code_of(rich), rich.message, rich.SerializeToString())
    assert type(again) is type(error)
    assert again.reason == error.reason
    assert vars(again) | {"reason": ""} == vars(error) | {"reason": ""}


@pytest.mark.parametrize("error", [ValueError("/secret/path"), errors.StartupError("/secret/path"), KeyError("x")])
def test_foreign_exceptions_show_no_internals(error: Exception) -> None:
    rich = status.from_error(error)
    assert status.code_of(rich) is grpc.StatusCode.INTERNAL
    assert b"secret" not in rich.SerializeToString()
    assert names(rich) == ["ErrorInfo"]


def test_a_huge_or_broken_text_stays_below_the_header_limit() -> None:
    """An adapter name of a megabyte, echoed in an error, made the peer drop the connection over its header size."""
    huge = "ä\ud800" * 500_000
    for error in (
        errors.AdapterNotFound(huge),
        errors.InvalidRequest(huge, huge, reason="X", metadata={f"{i}{huge}": huge for i in range(50)}),
        errors.InvalidAdapter(huge, huge),
    ):
        rich = status.from_error(error, request_id="\U0001f600" * 128)
        percent_encoded = 3 * len(rich.message.encode())
        base64 = len(rich.SerializeToString()) * 4 // 3
        assert percent_encoded + base64 < 8000
        info = error_details_pb2.ErrorInfo()
        assert rich.details[0].Unpack(info)
        assert info.metadata["request_id"] == "\U0001f600" * 128


@pytest.mark.parametrize(
    ("code", "message", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, "failed to connect to all addresses", errors.Unreachable),
        (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "SERVER: Received message larger than max (9 vs. 4)",
            errors.InvalidRequest,
        ),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded", errors.DeadlineExceeded),
        (grpc.StatusCode.UNIMPLEMENTED, "Method not found!", errors.Unimplemented),
        (grpc.StatusCode.UNKNOWN, "?", errors.EngineFault),
    ],
)
def test_statuses_that_grpc_made_itself(code: grpc.StatusCode, message: str, kind: type[errors.LoramuxError]) -> None:
    assert type(status.to_error(code, message, None)) is kind
