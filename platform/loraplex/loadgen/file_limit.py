"""How many streams one process may hold open: each takes a file descriptor."""

import resource

_OWN_FILES = 64
"""Of the process itself: libraries, pipes, the report."""


def allow_streams(count: int) -> int:
    """Raises the process's limit of open files towards ``count`` streams; how many it may have now. Never lowers it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return count
    wanted = count + _OWN_FILES
    if soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return min(count, soft - _OWN_FILES)
