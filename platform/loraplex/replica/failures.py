"""What the tenant hears of an exception that ended its request on a replica. Pure. Called where the replica catches."""

from loraplex.core.errors import BadConfig, Conflict, LoraplexError

_CODE = "generation_failed"


def request_failure(error: Exception, sentence: str) -> LoraplexError:
    """``error`` itself when it is of the tree. ``sentence`` stands for any other, which may hold paths and the like.

    A Conflict or a BadConfig within a replica is a fault of ours, never of the caller's, who could not mend it.
    """
    if not isinstance(error, LoraplexError):
        return LoraplexError(sentence, code=_CODE)
    if isinstance(error, Conflict | BadConfig):
        return LoraplexError(error.message, code=_CODE)
    return error
