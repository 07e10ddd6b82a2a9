"""Which adapters are loaded before their turn, so that admission finds them resident: those of waiting requests, and
those that the plan puts here.

Takes pages that are free, idle, or cached for nobody near; never preempts, and never takes what a request nearer to its
turn needs. Called by ``scheduler``.
"""

from collections.abc import Collection, Iterable

from loraplex.core.ids import Digest
from loraplex.engine.memory import Memory
from loraplex.engine.sequence import Sequence


def prefetch_adapters(memory: Memory, waiting: Iterable[Sequence], *, reserve: int) -> None:
    """Starts loads for ``waiting``: requests in the order of their turn, whose adapters are staged.

    ``reserve``: pages that stay available whatever happens. The first request whose adapter does not fit beside what
    the nearer ones need, or beside those that are loaded and not yet used, ends it: who comes after waits as well.
    Changes ``memory``.
    """
    adapters = memory.adapters
    claimed_pages = reserve
    claimed_share = adapters.num_resident_pages - adapters.num_idle_pages
    seen = set()
    for sequence in waiting:
        if not adapters.any_loadable:
            return
        digest = sequence.adapter
        if digest is not None and digest not in seen and adapters.num_users(digest) == 0:
            seen.add(digest)
            num_pages = adapters.num_pages(digest)
            claimed_pages += num_pages
            claimed_share += num_pages
            if claimed_pages > memory.num_available or claimed_share > memory.max_adapter_pages:
                return
            if adapters.is_loadable(digest):
                if adapters.num_ahead_pages and adapters.num_ahead_pages + num_pages > memory.max_ahead_pages:
                    return
                memory.load_adapter(digest, ahead=True)
        shared = memory.prefix.match(sequence)
        claimed_pages += memory.num_pages_for(len(sequence.token_ids)) - sum(
            memory.pool.num_references(page) > 0 for page in shared
        )
        memory.touch(sequence, shared)


def warm_adapter(memory: Memory, digest: Digest, *, wanted: Collection[Digest], reserve: int) -> bool:
    """Makes a staged adapter resident that the plan puts here; False when there is no room for it beside what runs and
    the others of ``wanted``, all of which count as used now. Changes ``memory``.

    ``reserve``: pages that stay available.
    """
    adapters = memory.adapters
    memory.touch_adapters(wanted)
    num_pages = adapters.num_pages_to_load(digest)
    if num_pages == 0:
        return True
    kept = sum(map(adapters.idle_pages_of, wanted))
    if num_pages + reserve > memory.num_available - kept:
        return False
    if adapters.num_resident_pages - adapters.num_idle_pages + kept + num_pages > memory.max_adapter_pages:
        return False
    memory.load_adapter(digest, ahead=True)
    return True
