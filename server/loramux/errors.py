"""Every error loramux raises on purpose, each with its cause and its gRPC status.

    LoramuxError
    ├── InvalidRequest        INVALID_ARGUMENT     a value out of its limits (BadRequest detail)
    ├── InvalidAdapter        INVALID_ARGUMENT     files that cannot be served on this base (PreconditionFailure detail)
    ├── AdapterUnavailable    FAILED_PRECONDITION  a registered adapter that failed to load, or cannot be used now
    ├── AdapterNotFound       NOT_FOUND            no adapter of that name (ResourceInfo detail)
    ├── UnknownService        NOT_FOUND            health of a service that this port does not serve
    ├── AdapterExists         ALREADY_EXISTS       the name holds other content and `replace` was not given
    ├── FolderExists          ALREADY_EXISTS       a folder to be written is there already
    ├── PathNotAllowed        PERMISSION_DENIED    a path that leaves the allowed roots
    ├── WrongScope            PERMISSION_DENIED    a token that is good for the other port only
    ├── Unauthenticated       UNAUTHENTICATED      no token, or a wrong one
    ├── Overloaded            RESOURCE_EXHAUSTED   queue full, budget full (RetryInfo detail, if trying again may help)
    ├── SlowReader            ABORTED              a client that does not read what it asked for
    ├── DeadlineExceeded      DEADLINE_EXCEEDED    the request's deadline passed; its work has stopped
    ├── Cancelled             CANCELLED            the client or an operator cancelled the request
    ├── Draining              UNAVAILABLE          the server is shutting down (RetryInfo detail)
    ├── Unreachable           UNAVAILABLE          (raised by clients) no server answers at the address
    ├── Unimplemented         UNIMPLEMENTED        part of the contract that this build does not serve yet
    ├── EngineFault           INTERNAL             a defect; the text tells clients nothing of the internals
    └── StartupError          (never on the wire)  the server cannot start: model, device, files, ports
        ├── TooLittleMemory                        weights, adapters, a step and one request do not fit
        └── UnsupportedModel                       a base model that cannot be driven flat, refused by name

    DeviceLost              no LoramuxError, and no Exception: the device has failed for good, and only a new process
                            can use it. Requests get an EngineFault of reason DEVICE_LOST

The status names are those of gRPC; `rpc.status` turns them into codes and details. Nothing here imports gRPC.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

_LONGEST_NAME = 128  # characters of a name that does not exist, in the sentence that says so


class LoramuxError(Exception):
    """Base of all. `reason` is ErrorInfo.reason (UPPER_SNAKE_CASE), `metadata` is ErrorInfo.metadata."""

    status: ClassVar[str] = "INTERNAL"
    reason: str = "INTERNAL"

    def __init__(
        self, message: str, *, reason: str | None = None, metadata: Mapping[str, object] | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        if reason is not None:
            self.reason = reason
        self.metadata: dict[str, str] = {k: str(v) for k, v in (metadata or {}).items()}


class InvalidRequest(LoramuxError):
    """A value that is out of its limits. `field` is the proto field path, e.g. "sampling.top_p"."""

    status = "INVALID_ARGUMENT"
    reason = "INVALID_VALUE"

    def __init__(
        self,
        field: str,
        message: str,
        *,
        reason: str | None = None,
        metadata: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(f"{field}: {message}", reason=reason, metadata={"field": field, **(metadata or {})})
        self.field = field
        self.description = message


class InvalidAdapter(LoramuxError):
    """Adapter files that are corrupt, unsupported or made for another base. `subject` is the field or tensor."""

    status = "INVALID_ARGUMENT"
    reason = "INVALID_ADAPTER"

    def __init__(
        self,
        subject: str,
        message: str,
        *,
        reason: str | None = None,
        metadata: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(f"{subject}: {message}", reason=reason, metadata={"subject": subject, **(metadata or {})})
        self.subject = subject
        self.description = message


class AdapterUnavailable(LoramuxError):
    """A registered adapter whose load failed, or that this server cannot use now."""

    status = "FAILED_PRECONDITION"
    reason = "ADAPTER_UNAVAILABLE"


class AdapterNotFound(LoramuxError):
    """No adapter has this name. Never answered with the base instead."""

    status = "NOT_FOUND"
    reason = "ADAPTER_NOT_FOUND"

    def __init__(self, name: str, *, hint: str = "", message: str = "") -> None:
        """`hint`: what is known of the name, in place of where to look for names; `message`: the whole text, where a
        server has written it."""
        name = name if len(name) <= _LONGEST_NAME else name[:_LONGEST_NAME] + "…"
        hint = hint or "`loramux adapters list` shows those there are, and an empty name asks for the base model"
        super().__init__(message or f"there is no adapter {name!r}; {hint}", metadata={"adapter": name})
        self.name = name


class UnknownService(LoramuxError):
    """The health of a service was asked for that this port does not serve."""

    status = "NOT_FOUND"
    reason = "UNKNOWN_SERVICE"


class AdapterExists(LoramuxError):
    """The name holds other content."""

    status = "ALREADY_EXISTS"
    reason = "ADAPTER_EXISTS"


class FolderExists(LoramuxError):
    """The folder that was to be written is there already; nothing is ever written over."""

    status = "ALREADY_EXISTS"
    reason = "FOLDER_EXISTS"


class PathNotAllowed(LoramuxError):
    """A path outside the allowed roots, after resolving `..` and symbolic links."""

    status = "PERMISSION_DENIED"
    reason = "PATH_NOT_ALLOWED"


class WrongScope(LoramuxError):
    """A valid token on the wrong port: the public one on the admin port, or the other way round. metadata: see
    Unauthenticated."""

    status = "PERMISSION_DENIED"
    reason = "WRONG_SCOPE"


class Unauthenticated(LoramuxError):
    """No bearer token, or a wrong one. metadata["scope"] is the port that was asked, public or admin."""

    status = "UNAUTHENTICATED"
    reason = "UNAUTHENTICATED"


class Overloaded(LoramuxError):
    """Something bounded is full. `retry_after` is in seconds; None: it stays full until somebody makes room."""

    status = "RESOURCE_EXHAUSTED"
    reason = "OVERLOADED"

    def __init__(
        self,
        message: str,
        *,
        retry_after: float | None = 1.0,
        reason: str | None = None,
        metadata: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(message, reason=reason, metadata=metadata)
        self.retry_after = retry_after


class SlowReader(LoramuxError):
    """The client does not read its stream. Sent again as it is, the request would end the same way."""

    status = "ABORTED"
    reason = "SLOW_READER"


class DeadlineExceeded(LoramuxError):
    """The deadline passed while the request was queued or running."""

    status = "DEADLINE_EXCEEDED"
    reason = "DEADLINE_EXCEEDED"


class Cancelled(LoramuxError):
    """The client went away, or an operator cancelled the request (unload with cancel)."""

    status = "CANCELLED"
    reason = "CANCELLED"


class Draining(LoramuxError):
    """The server is going away: it takes no new requests, and running ones end when the drain's time is over.

    `retry_after` is in seconds.
    """

    status = "UNAVAILABLE"
    reason = "DRAINING"

    def __init__(
        self,
        message: str,
        *,
        retry_after: float = 1.0,
        metadata: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(message, metadata=metadata)
        self.retry_after = retry_after


class Unreachable(LoramuxError):
    """No server answers at the address, or the connection broke. Made by the client, never sent by a server."""

    status = "UNAVAILABLE"
    reason = "UNREACHABLE"


class Unimplemented(LoramuxError):
    """Part of the contract that this build does not serve yet."""

    status = "UNIMPLEMENTED"
    reason = "UNIMPLEMENTED"


class EngineFault(LoramuxError):
    """A defect in the engine. The log has the traceback; clients get a sentence without internals."""

    status = "INTERNAL"
    reason = "ENGINE_FAULT"


class DeviceLost(BaseException):
    """The device is of no use to this process any more. No Exception: what lets one request fail and goes on with the
    others must not take it for a fault of that request."""


class StartupError(LoramuxError):
    """The server cannot start; the command line prints the sentence and exits with 1."""

    reason = "STARTUP"


class TooLittleMemory(StartupError):
    """What was asked for does not fit into the memory that is there; `missing` bytes more would do."""

    def __init__(self, message: str, missing: int) -> None:
        super().__init__(message)
        self.missing = missing


class UnsupportedModel(StartupError):
    """A base model that cannot be driven flat, or cannot be quantized. Names the model and the reason."""

    reason = "UNSUPPORTED_MODEL"
