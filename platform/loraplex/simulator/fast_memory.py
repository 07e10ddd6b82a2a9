"""Pages of the fast simulator: KV of finished requests and idle adapters in order of last use, as ``engine.memory``.

Counts stand for page ids; the prefix cache is modelled for a request that comes back after a preemption, since a trace
tells no other equal prompts. Compiled; called by ``fast_scheduler``.
"""

from loraplex.simulator.cluster import PAGE_SIZE
from loraplex.simulator.compiled import inlined, inner
from loraplex.simulator.fast_state import NONE, SENT, State


@inlined
def num_pages_for(num_tokens: int) -> int:
    return (num_tokens + PAGE_SIZE - 1) // PAGE_SIZE


@inlined
def pages_of_adapter(state: State, p: int, adapter: int) -> int:
    return int(state.adapters[state.replicas[p].cost, adapter].pages)


@inlined
def num_available(state: State, p: int) -> int:
    replica = state.replicas[p]
    return int(replica.num_free + replica.num_cached + replica.num_idle)


@inlined
def take(state: State, p: int, count: int) -> None:
    """``count`` pages, which are available; what was used longest ago goes first."""
    replica = state.replicas[p]
    if replica.num_free < count:
        _reclaim(state, p, count)
    replica.num_free -= count


@inner
def _reclaim(state: State, p: int, count: int) -> None:
    """Frees pages until there are ``count``."""
    replica = state.replicas[p]
    while replica.num_free < count:
        kv, idle = replica.kv_head, replica.idle_head
        if kv != NONE and (idle == NONE or state.requests[kv].stamp <= state.pairs[idle, p].stamp):
            request = state.requests[kv]
            reclaimed = min(count - replica.num_free, request.cached)
            request.cached -= reclaimed
            replica.num_cached -= reclaimed
            replica.num_free += reclaimed
            if request.cached == 0:
                forget_kv(state, p, kv)
        else:
            drop_idle(state, p, idle)


@inlined
def keep_kv(state: State, p: int, r: int, num_pages: int) -> None:
    """Pages of a request that stopped are kept for their content."""
    if num_pages == 0:
        return
    replica, request = state.replicas[p], state.requests[r]
    request.cached = num_pages
    request.stamp = replica.stamp
    request.previous, request.next = replica.kv_tail, NONE
    if replica.kv_tail != NONE:
        state.requests[replica.kv_tail].next = r
    else:
        replica.kv_head = r
    replica.kv_tail = r
    replica.num_cached += num_pages


@inner
def forget_kv(state: State, p: int, r: int) -> None:
    """Takes a request out of the order; its pages are counted elsewhere."""
    replica, request = state.replicas[p], state.requests[r]
    if request.previous != NONE:
        state.requests[request.previous].next = request.next
    else:
        replica.kv_head = request.next
    if request.next != NONE:
        state.requests[request.next].previous = request.previous
    else:
        replica.kv_tail = request.previous


@inlined
def make_idle(state: State, p: int, adapter: int) -> None:
    """Its last running request left: last in the order."""
    replica, pair = state.replicas[p], state.pairs[adapter, p]
    pair.stamp = replica.stamp
    pair.previous, pair.next = replica.idle_tail, NONE
    if replica.idle_tail != NONE:
        state.pairs[replica.idle_tail, p].next = adapter
    else:
        replica.idle_head = adapter
    replica.idle_tail = adapter
    replica.num_idle += pages_of_adapter(state, p, adapter)


@inlined
def end_idle(state: State, p: int, adapter: int) -> None:
    """It is used again, or dropped."""
    replica, pair = state.replicas[p], state.pairs[adapter, p]
    if pair.previous != NONE:
        state.pairs[pair.previous, p].next = pair.next
    else:
        replica.idle_head = pair.next
    if pair.next != NONE:
        state.pairs[pair.next, p].previous = pair.previous
    else:
        replica.idle_tail = pair.previous
    replica.num_idle -= pages_of_adapter(state, p, adapter)


@inner
def drop_idle(state: State, p: int, adapter: int) -> None:
    end_idle(state, p, adapter)
    replica, pair = state.replicas[p], state.pairs[adapter, p]
    pages = pages_of_adapter(state, p, adapter)
    pair.resident = False
    state.seen[adapter, p] &= SENT
    replica.num_adapter_pages -= pages
    replica.num_free += pages


@inlined
def is_short(state: State, p: int, r: int, reserve: int) -> bool:
    """Whether pages of the arena or of the adapters' share are missing to admit a request and leave ``reserve``."""
    replica, request = state.replicas[p], state.requests[r]
    shared = min(request.cached, (request.known - 1) // PAGE_SIZE)
    needed = num_pages_for(request.known) - shared + reserve
    available = num_available(state, p) - shared
    if request.adapter != NONE:
        pages = pages_of_adapter(state, p, request.adapter)
        pair = state.pairs[request.adapter, p]
        if not pair.resident:
            needed += pages
            if replica.num_adapter_pages - replica.num_idle + pages > replica.max_adapter_pages:
                return True
        elif pair.users == 0:
            available -= pages
    return bool(needed > available)


@inner
def load_adapter(state: State, p: int, adapter: int, now_s: float) -> float:
    """Makes it resident and idle; when its bytes are there."""
    replica, pair = state.replicas[p], state.pairs[adapter, p]
    pages = pages_of_adapter(state, p, adapter)
    while replica.num_adapter_pages + pages > replica.max_adapter_pages:
        drop_idle(state, p, replica.idle_head)
    take(state, p, pages)
    replica.num_adapter_pages += pages
    pair.resident = True
    make_idle(state, p, adapter)
    state.slots[p, replica.num_fresh].fresh = adapter
    replica.num_fresh += 1
    replica.num_loads += 1
    replica.num_loaded_pages += pages
    load_s = float(state.adapters[replica.cost, adapter].load_s)
    ready_s = max(now_s, float(state.groups[replica.group].link_free_s)) + load_s
    state.groups[replica.group].link_free_s = ready_s
    return ready_s


@inlined
def pages_to_grow(state: State, p: int, first: int, last: int) -> int:
    """Pages that the decoding requests need for steps ``first`` to ``last``."""
    count = last - first + 1
    if count <= 0:
        return 0
    needed = (count // PAGE_SIZE) * state.replicas[p].num_decoding
    for step in range(first, first + count % PAGE_SIZE):
        needed += state.phases[p, (-step) % PAGE_SIZE]
    return int(needed)


@inlined
def grow_until(state: State, p: int, step: int) -> None:
    """Pages for all tokens up to ``step``; they are available."""
    replica = state.replicas[p]
    if step > replica.paged_step:
        take(state, p, pages_to_grow(state, p, replica.paged_step + 1, step))
        replica.paged_step = step


@inner
def steps_with_pages(state: State, p: int, first: int, count: int) -> int:
    """How many of ``count`` steps from ``first`` on have the pages that they need."""
    available, paged = num_available(state, p), state.replicas[p].paged_step
    if pages_to_grow(state, p, max(first, paged + 1), first + count - 1) <= available:
        return count
    low, high = 0, count
    while high - low > 1:
        middle = (low + high) // 2
        if pages_to_grow(state, p, max(first, paged + 1), first + middle - 1) <= available:
            low = middle
        else:
            high = middle
    return low
