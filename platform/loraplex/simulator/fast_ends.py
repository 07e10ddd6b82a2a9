"""Which decoding request of a replica of the fast simulator ends first: a binary heap by last step.

Compiled; called by ``fast_scheduler``.
"""

from loraplex.simulator.compiled import inlined
from loraplex.simulator.fast_state import State


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
