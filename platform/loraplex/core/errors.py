"""The one error tree. Raised where found, mapped to HTTP and gRPC status in ``gateway/status.py``.

LoraplexError
|- InvalidInput          the caller's input is wrong; ``param`` names the field     400
|  |- ContextTooLong     prompt + output exceed the context of the base            400
|  |- BadAdapter         an adapter's files are refused at intake                  400
|  `- BadConfig          a config file or option is wrong                          (CLI: exit 2)
|- Unauthenticated       no key, or an unknown one                                 401
|- PermissionDenied      a valid key without the right                             403
|- NotFound              unknown model, adapter, tenant, or not visible            404
|- Conflict              the name exists, or the state forbids it                  409
|- PayloadTooLarge       body or adapter over the limit                            413
|- RateLimited           a tenant's limit; ``retry_after_s``                       429
|- Overloaded            no replica can serve in time; ``retry_after_s``           429
|- StorageFull           the artifact store or database cannot take more           507
|- Unavailable           a needed part is away; ``retry_after_s``                  503
|- ReplicaLost           the stream to a replica broke; the router resubmits       503 when it cannot
`- ExecutorLost          a process that an executor runs on is gone or hangs: the replica ends
"""


class LoraplexError(Exception):
    """Base of all. ``message`` is safe to show to the tenant; ``code`` is a stable machine word."""

    code = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code

    @property
    def class_code(self) -> str:
        """The code by which ``error_from_code`` finds the class again, also where ``code`` names a special case."""
        return self.code if type(self) is LoraplexError else type(self).code


class InvalidInput(LoraplexError):
    code = "invalid_value"


class ContextTooLong(InvalidInput):
    code = "context_length_exceeded"


class BadAdapter(InvalidInput):
    code = "invalid_adapter"


class BadConfig(InvalidInput):
    code = "invalid_config"


class Unauthenticated(LoraplexError):
    code = "invalid_api_key"


class PermissionDenied(LoraplexError):
    code = "permission_denied"


class NotFound(LoraplexError):
    code = "not_found"


class Conflict(LoraplexError):
    code = "conflict"


class PayloadTooLarge(LoraplexError):
    code = "payload_too_large"


class _Retryable(LoraplexError):
    """Carries when a retry may succeed, in seconds."""

    def __init__(
        self,
        message: str,
        *,
        retry_after_s: float = 1.0,
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message, param=param, code=code)
        self.retry_after_s = retry_after_s


class RateLimited(_Retryable):
    code = "rate_limit_exceeded"


class Overloaded(_Retryable):
    code = "overloaded"


class StorageFull(LoraplexError):
    code = "storage_full"


class Unavailable(_Retryable):
    code = "unavailable"


class ReplicaLost(_Retryable):
    code = "replica_lost"


class ExecutorLost(LoraplexError):
    code = "executor_lost"


_BY_CODE: dict[str, type[LoraplexError]] = {
    cls.code: cls
    for cls in (
        LoraplexError,
        InvalidInput,
        ContextTooLong,
        BadAdapter,
        BadConfig,
        Unauthenticated,
        PermissionDenied,
        NotFound,
        Conflict,
        PayloadTooLarge,
        RateLimited,
        Overloaded,
        StorageFull,
        Unavailable,
        ReplicaLost,
        ExecutorLost,
    )
}


def error_from_code(code: str, message: str) -> LoraplexError:
    """The error that another process told by its ``class_code``; a plain LoraplexError when the code is unknown."""
    cls = _BY_CODE.get(code)
    return LoraplexError(message, code=code) if cls is None else cls(message)
