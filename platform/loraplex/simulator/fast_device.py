"""Whose turn it is on the GPUs of a group of the fast simulator: ``model_runner.turns`` in counts. Compiled; called by
``fast_steps`` and ``fast_pipeline``.
"""

from loraplex.simulator.compiled import inlined, inner
from loraplex.simulator.fast_state import NONE, State


@inlined
def has_turn(state: State, p: int) -> bool:
    return bool(state.groups[state.replicas[p].group].holder == p)


@inlined
def take_turn(state: State, p: int) -> bool:
    """At once; False: it waits, behind those that do."""
    replica = state.replicas[p]
    group = state.groups[replica.group]
    if group.holder == NONE:
        group.holder = p
        return True
    replica.waits = True
    replica.asked = group.num_asked
    group.num_asked += 1
    return False


@inlined
def is_wanted(state: State, p: int) -> bool:
    """Another replica waits for the turn of this one."""
    replica = state.replicas[p]
    num_waiting = 0
    for other in range(replica.first_of_group, replica.end_of_group):
        num_waiting += state.replicas[other].waits
    return bool(num_waiting > 0)


@inner
def hand_over(state: State, p: int) -> int:
    """The turn of a replica ends: whose it is now, or NONE."""
    replica = state.replicas[p]
    following = NONE
    for other in range(replica.first_of_group, replica.end_of_group):
        if state.replicas[other].waits and (
            following == NONE or state.replicas[other].asked < state.replicas[following].asked
        ):
            following = other
    state.groups[replica.group].holder = following
    if following != NONE:
        state.replicas[following].waits = False
    return following
