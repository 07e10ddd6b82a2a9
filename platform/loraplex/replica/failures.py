"""What the tenant hears of an exception that ended its request on a replica. Pure. Called where the replica catches,
which logs the exception itself."""

from loraplex.core.errors import BadConfig, Conflict, LoraplexError

_CODE = "generation_failed"


def request_failure(error: Exception, sentence: str) -> LoraplexError:
    """``error`` itself when it is of the tree. ``sentence`` stands for any other, which may hold paths and the like,
    and for a Conflict or a BadConfig: within a replica these are faults of ours, never of the caller's.
    """
    if not isinstance(error, LoraplexError) or isinstance(error, Conflict | BadConfig):
        return LoraplexError(sentence, code=_CODE)
    return error
