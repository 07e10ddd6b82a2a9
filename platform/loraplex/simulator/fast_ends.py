"""Which decoding request of a replica of the fast simulator ends first: a binary heap by last step.

Compiled; called by ``fast_scheduler``.
"""

from loraplex.simulator.compiled import inlined
from loraplex.simulator.fast_state import NONE, State


@inlined
def push_end(state: State, p: int, r: int, step: int) -> None:
    """The last step of request ``r`` is ``step``."""
    replica = state.replicas[p]
    replica.num_ends += 1
    _rise(state, p, replica.num_ends - 1, r, step)


@inlined
def remove_end(state: State, p: int, index: int) -> None:
    """Takes the entry at ``index`` out; that at 0 is the first to end."""
    replica = state.replicas[p]
    replica.num_ends -= 1
    size = replica.num_ends
    if index == size:
        return
    r, step = state.slots[p, size].end_request, state.slots[p, size].end_step
    while True:
        child = 2 * index + 1
        if child >= size:
            break
        if child + 1 < size and state.slots[p, child + 1].end_step < state.slots[p, child].end_step:
            child += 1
        if state.slots[p, child].end_step >= step:
            break
        state.slots[p, index].end_request = state.slots[p, child].end_request
        state.slots[p, index].end_step = state.slots[p, child].end_step
        index = child
    _rise(state, p, index, r, step)


@inlined
def position_of_end(state: State, p: int, r: int) -> int:
    index = 0
    while state.slots[p, index].end_request != r:
        index += 1
    return index


@inlined
def num_ends_at(state: State, p: int, step: int) -> int:
    """How many requests end with ``step``, before which none does."""
    count, index = 0, _next_end(state, p, NONE, step)
    while index != NONE:
        count += 1
        index = _next_end(state, p, index, step)
    return count


@inlined
def first_end_at(state: State, p: int, step: int) -> int:
    """Where in the heap that request is whose row comes first in ``step``, of those that end with it; NONE: no request
    does. None ends before."""
    first, index = NONE, _next_end(state, p, NONE, step)
    while index != NONE:
        if first == NONE or is_row_before(state, state.slots[p, index].end_request, state.slots[p, first].end_request):
            first = index
        index = _next_end(state, p, index, step)
    return first


@inlined
def is_row_before(state: State, r: int, other: int) -> bool:
    one, two = state.requests[r], state.requests[other]
    return bool(one.row_order < two.row_order or (one.row_order == two.row_order and one.order < two.order))


@inlined
def _next_end(state: State, p: int, index: int, step: int) -> int:
    """Those that end with ``step``, the least there is, are a tree from the root on: who comes after ``index``, or
    NONE; after NONE comes the root."""
    size = state.replicas[p].num_ends
    index = 0 if index == NONE else 2 * index + 1
    while index >= size or state.slots[p, index].end_step != step:
        while index > 0 and index % 2 == 0:
            index = (index - 1) // 2
        if index == 0:
            return NONE
        index += 1
    return index


@inlined
def _rise(state: State, p: int, index: int, r: int, step: int) -> None:
    """Puts (r, step) at ``index`` or above it."""
    while index > 0:
        parent = (index - 1) // 2
        if state.slots[p, parent].end_step <= step:
            break
        state.slots[p, index].end_request = state.slots[p, parent].end_request
        state.slots[p, index].end_step = state.slots[p, parent].end_step
        index = parent
    state.slots[p, index].end_request = r
    state.slots[p, index].end_step = step
