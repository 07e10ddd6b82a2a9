"""The one map of errors to HTTP and gRPC status. Knows neither FastAPI nor a gRPC server; both fronts read it."""

from dataclasses import dataclass

import grpc

from loraplex.core import errors


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorStatus:
    http: int
    grpc: grpc.StatusCode
    type: str
    """The ``type`` of the OpenAI error object."""


_INTERNAL = ErrorStatus(http=500, grpc=grpc.StatusCode.INTERNAL, type="server_error")

_STATUS: dict[type[Exception], ErrorStatus] = {
    errors.LoraplexError: _INTERNAL,
    # A setting of ours that turned out wrong while we serve: nothing that the caller could mend.
    errors.BadConfig: _INTERNAL,
    errors.InvalidInput: ErrorStatus(http=400, grpc=grpc.StatusCode.INVALID_ARGUMENT, type="invalid_request_error"),
    errors.Unauthenticated: ErrorStatus(http=401, grpc=grpc.StatusCode.UNAUTHENTICATED, type="authentication_error"),
    errors.PermissionDenied: ErrorStatus(http=403, grpc=grpc.StatusCode.PERMISSION_DENIED, type="permission_error"),
    errors.NotFound: ErrorStatus(http=404, grpc=grpc.StatusCode.NOT_FOUND, type="invalid_request_error"),
    errors.Conflict: ErrorStatus(http=409, grpc=grpc.StatusCode.FAILED_PRECONDITION, type="invalid_request_error"),
    errors.PayloadTooLarge: ErrorStatus(
        http=413, grpc=grpc.StatusCode.RESOURCE_EXHAUSTED, type="invalid_request_error"
    ),
    errors.RateLimited: ErrorStatus(http=429, grpc=grpc.StatusCode.RESOURCE_EXHAUSTED, type="rate_limit_error"),
    errors.Overloaded: ErrorStatus(http=429, grpc=grpc.StatusCode.RESOURCE_EXHAUSTED, type="overloaded_error"),
    errors.StorageFull: ErrorStatus(http=507, grpc=grpc.StatusCode.RESOURCE_EXHAUSTED, type="server_error"),
    errors.Unavailable: ErrorStatus(http=503, grpc=grpc.StatusCode.UNAVAILABLE, type="server_error"),
    errors.ReplicaLost: ErrorStatus(http=503, grpc=grpc.StatusCode.UNAVAILABLE, type="server_error"),
}

HTTP_OK = 200
HTTP_CLIENT_GONE = 499
"""Recorded in traces and metrics, never sent: the client closed its connection."""


def status_of(error: Exception) -> ErrorStatus:
    """The most specific entry of the error's class; anything outside the tree is our own bug, hence 500."""
    for cls in type(error).__mro__:
        status = _STATUS.get(cls)
        if status is not None:
            return status
    return _INTERNAL


def shown(error: Exception) -> errors.LoraplexError:
    """``error`` as the caller may read it: what is our own bug or misconfiguration says only that it happened."""
    if isinstance(error, errors.LoraplexError) and not isinstance(error, errors.BadConfig):
        return error
    return errors.LoraplexError("The server failed on this request.")


def retry_after_s(error: Exception) -> float | None:
    """Seconds after which a retry may succeed; None when the error does not say."""
    value = getattr(error, "retry_after_s", None)
    return float(value) if isinstance(value, int | float) else None
