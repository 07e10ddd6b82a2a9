"""The running requests of a pipeline in the fast simulator, in the order of a step's rows. Compiled; called by
``fast_scheduler``.
"""

from loraplex.simulator.compiled import inlined
from loraplex.simulator.fast_ends import is_row_before
from loraplex.simulator.fast_state import State


@inlined
def put_in_row_order(state: State, p: int, r: int) -> None:
    """The last of the running goes to where its row is."""
    index = state.requests[r].position
    while index > 0:
        before = state.slots[p, index - 1].running
        if not is_row_before(state, r, before):
            break
        state.slots[p, index].running = before
        state.requests[before].position = index
        index -= 1
    state.slots[p, index].running = r
    state.requests[r].position = index


@inlined
def take_out_of_rows(state: State, p: int, r: int) -> None:
    replica = state.replicas[p]
    replica.num_running -= 1
    for index in range(state.requests[r].position, replica.num_running):
        moved = state.slots[p, index + 1].running
        state.slots[p, index].running = moved
        state.requests[moved].position = index
