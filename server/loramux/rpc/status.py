"""The one status table: loramux errors to gRPC statuses with google.rpc details, and back.

    error                status                details beside ErrorInfo
    InvalidRequest       INVALID_ARGUMENT      BadRequest
    InvalidAdapter       INVALID_ARGUMENT      PreconditionFailure
    AdapterUnavailable   FAILED_PRECONDITION   PreconditionFailure
    AdapterNotFound      NOT_FOUND             ResourceInfo
    Overloaded           RESOURCE_EXHAUSTED    RetryInfo, if it has a `retry_after`
    Draining             UNAVAILABLE           RetryInfo
    other LoramuxError   its `status`          –
    any other exception  INTERNAL              – (the text tells nothing of the internals)

Servers use `from_error`, clients `to_error`. Knows nothing of servicers and channels.
"""

from __future__ import annotations

import math
from typing import Any

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2 as details_pb2  # type: ignore[import-untyped]
from google.rpc import status_pb2

from loramux import errors

DOMAIN = "loramux"
DETAILS_KEY = "grpc-status-details-bin"
OPAQUE = "the server failed on this request; its log has the details"

# gRPC peers refuse headers beyond 8 KiB (some at random from there on). A message appears percent-encoded in
# `grpc-message` and twice more, base64-encoded, in the details: these bounds keep the worst case below that.
_MAX_MESSAGE = 800
_MAX_VALUE = 120
_MAX_METADATA = 6
_MAX_REQUEST_ID = 512  # 128 characters, whatever they are: whoever searches for an id needs all of it

_CODES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}
_BY_CODE: dict[grpc.StatusCode, type[errors.LoramuxError]] = {
    grpc.StatusCode.FAILED_PRECONDITION: errors.AdapterUnavailable,
    grpc.StatusCode.NOT_FOUND: errors.UnknownService,
    grpc.StatusCode.ALREADY_EXISTS: errors.AdapterExists,
    grpc.StatusCode.PERMISSION_DENIED: errors.PathNotAllowed,
    grpc.StatusCode.UNAUTHENTICATED: errors.Unauthenticated,
    grpc.StatusCode.ABORTED: errors.SlowReader,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
    grpc.StatusCode.CANCELLED: errors.Cancelled,
    grpc.StatusCode.UNAVAILABLE: errors.Unreachable,
    grpc.StatusCode.UNIMPLEMENTED: errors.Unimplemented,
}


def from_error(error: BaseException, request_id: str = "") -> status_pb2.Status:
    """The google.rpc.Status of an error. `request_id`, if there is one, becomes metadata of its ErrorInfo.

    Startup errors and foreign exceptions become INTERNAL without their text; callers log them.
    """
    if not isinstance(error, errors.LoramuxError) or isinstance(error, errors.StartupError):
        error = errors.EngineFault(OPAQUE)
    status = status_pb2.Status(code=grpc.StatusCode[error.status].value[0], message=_clip(error.message, _MAX_MESSAGE))
    metadata = list(error.metadata.items())[:_MAX_METADATA]
    info = details_pb2.ErrorInfo(
        reason=error.reason,
        domain=DOMAIN,
        metadata={_clip(key, _MAX_VALUE): _clip(value, _MAX_VALUE) for key, value in metadata},
    )
    if request_id:
        info.metadata["request_id"] = _clip(request_id, _MAX_REQUEST_ID)
    for detail in (info, *_details(error)):
        status.details.add().Pack(detail)
    return status


def code_of(status: status_pb2.Status) -> grpc.StatusCode:
    """gRPC's code of a google.rpc.Status."""
    return _CODES[status.code]


def _details(error: errors.LoramuxError) -> tuple[Message, ...]:
    match error:
        case errors.InvalidRequest():
            violation = details_pb2.BadRequest.FieldViolation(
                field=_clip(error.field, _MAX_VALUE), description=_clip(error.description, _MAX_MESSAGE)
            )
            return (details_pb2.BadRequest(field_violations=[violation]),)
        case errors.InvalidAdapter():
            return (_precondition(error, error.subject, error.description),)
        case errors.AdapterUnavailable():
            return (_precondition(error, error.metadata.get("adapter", ""), error.message),)
        case errors.AdapterNotFound():
            name = _clip(error.name, _MAX_VALUE)
            return (details_pb2.ResourceInfo(resource_type="loramux.v1.Adapter", resource_name=name),)
        case errors.Overloaded(retry_after=None):
            return ()
        case errors.Overloaded() | errors.Draining():
            assert error.retry_after is not None
            seconds = error.retry_after if math.isfinite(error.retry_after) else 1.0
            retry = details_pb2.RetryInfo()
            retry.retry_delay.FromNanoseconds(max(0, int(seconds * 1e9)))
            return (retry,)
    return ()


def _precondition(error: errors.LoramuxError, subject: str, description: str) -> Message:
    violation = details_pb2.PreconditionFailure.Violation(
        type=error.reason, subject=_clip(subject, _MAX_VALUE), description=_clip(description, _MAX_MESSAGE)
    )
    failure: Message = details_pb2.PreconditionFailure(violations=[violation])
    return failure


def _clip(text: str, limit: int) -> str:
    """At most `limit` bytes of valid UTF-8; what callers sent may be anything, lone surrogates included."""
    raw = text.encode("utf-8", "replace")
    if len(raw) <= limit:
        return raw.decode("utf-8")
    return raw[: limit - 3].decode("utf-8", "ignore") + "…"


def to_error(code: grpc.StatusCode, message: str, details: bytes | None) -> errors.LoramuxError:
    """The error that a server raised, from an RPC's status. `details`: the value of grpc-status-details-bin.

    Statuses that gRPC itself made (no details) become the nearest class: a broken connection is Unreachable, a
    message beyond the server's hard cap InvalidRequest.
    """
    status = status_pb2.Status()
    if details is not None:
        status.ParseFromString(details)
    found = _unpack(status)
    info = found.get("ErrorInfo")
    reason = info.reason if info is not None else None
    metadata = dict(info.metadata) if info is not None else {}
    match code:
        case grpc.StatusCode.INVALID_ARGUMENT if "PreconditionFailure" in found:
            violation = found["PreconditionFailure"].violations[0]
            return errors.InvalidAdapter(violation.subject, violation.description, reason=reason, metadata=metadata)
        case grpc.StatusCode.INVALID_ARGUMENT if "BadRequest" in found:
            violation = found["BadRequest"].field_violations[0]
            return errors.InvalidRequest(violation.field, violation.description, reason=reason, metadata=metadata)
        case grpc.StatusCode.NOT_FOUND if "ResourceInfo" in found:
            not_found = errors.AdapterNotFound(found["ResourceInfo"].resource_name, message=message)
            not_found.metadata |= metadata
            return not_found
        case grpc.StatusCode.RESOURCE_EXHAUSTED if info is None and "larger than max" in message:
            return errors.InvalidRequest("request", message, reason="MESSAGE_TOO_LARGE")
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            retry_after = None if info is not None and "RetryInfo" not in found else _retry_after(found)
            return errors.Overloaded(message, retry_after=retry_after, reason=reason, metadata=metadata)
        case grpc.StatusCode.UNAVAILABLE if info is not None:
            return errors.Draining(message, retry_after=_retry_after(found), metadata=metadata)
        case grpc.StatusCode.ALREADY_EXISTS if reason == errors.FolderExists.reason:
            return errors.FolderExists(message, metadata=metadata)
        case grpc.StatusCode.PERMISSION_DENIED if reason == errors.WrongScope.reason:
            return errors.WrongScope(message, metadata=metadata)
    kind = _BY_CODE.get(code, errors.EngineFault)
    return kind(message, reason=reason, metadata=metadata)


def _unpack(status: status_pb2.Status) -> dict[str, Any]:
    """Details by message name; unknown ones (a newer server's) are skipped."""
    known = ("ErrorInfo", "BadRequest", "PreconditionFailure", "ResourceInfo", "RetryInfo")
    found: dict[str, Any] = {}
    for packed in status.details:
        name = packed.type_url.rsplit(".", 1)[-1]
        if name in known:
            found[name] = getattr(details_pb2, name)()
            packed.Unpack(found[name])
    return found


def _retry_after(found: dict[str, Any]) -> float:
    """Seconds from RetryInfo; 1 without."""
    retry = found.get("RetryInfo")
    return float(retry.retry_delay.ToNanoseconds()) / 1e9 if retry is not None else 1.0
