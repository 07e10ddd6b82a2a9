"""What each tenant has had of a replica of the fast simulator: ``engine.turns`` and ``tenancy.fairness`` in arrays.

A tenant pays for a prompt as it is computed, and for a token when it is drawn; until the step that admits a request is
done, what it will cost counts in the order, but lifts nobody. Compiled; called by ``fast_scheduler``.
"""

import numpy as np

from loraplex.simulator.compiled import inlined, inner
from loraplex.simulator.fast_runs import steps_until
from loraplex.simulator.fast_state import Knobs, State


@inlined
def service_of(state: State, knobs: Knobs, p: int, t: int, step: int) -> float:
    """What a tenant has had of a replica when ``step`` is done."""
    tenant = state.tenants[p, t]
    return float(tenant.counter + knobs.decode_cost * tenant.num_decoding * step)


@inlined
def enter_turns(state: State, knobs: Knobs, p: int, t: int, now_s: float) -> None:
    """A request of a tenant came; one that was away is lifted to the least of those that are there."""
    replica, tenant = state.replicas[p], state.tenants[p, t]
    if tenant.num_active == 0:
        if replica.num_tenants > 0:
            step = replica.step
            if replica.running and replica.run_count > 1:
                step += steps_until(state, p, now_s) - 1
            least = np.inf
            for index in range(replica.num_tenants):
                least = min(least, service_of(state, knobs, p, state.tenants[p, index].active, step))
            tenant.counter = max(tenant.counter, least)
        tenant.position = replica.num_tenants
        state.tenants[p, replica.num_tenants].active = t
        replica.num_tenants += 1
    tenant.num_active += 1


@inlined
def leave_turns(state: State, p: int, t: int) -> None:
    """It ended. When nobody is left all start anew."""
    replica, tenant = state.replicas[p], state.tenants[p, t]
    tenant.num_active -= 1
    if tenant.num_active > 0:
        return
    replica.num_tenants -= 1
    moved = state.tenants[p, replica.num_tenants].active
    state.tenants[p, tenant.position].active = moved
    state.tenants[p, moved].position = tenant.position
    if replica.num_tenants == 0:
        for index in range(state.tenants.shape[1]):
            state.tenants[p, index].counter = 0.0


@inlined
def owe(state: State, knobs: Knobs, p: int, r: int) -> float:
    """A request is admitted: what its tenant will pay for that, which is answered, counts in the order from now on."""
    request = state.requests[r]
    uncharged = request.known - max(request.scheduled, request.charged)
    cost = float(max(0, uncharged) * knobs.prefill_cost + knobs.decode_cost)
    state.tenants[p, request.tenant].admitted += cost
    return cost


@inner
def pay(state: State, knobs: Knobs, p: int, r: int, start: int, count: int, admitted: float) -> None:
    """A chunk of a prompt was computed, ``count`` tokens from ``start`` on; ``admitted``: what ``owe`` answered, if the
    chunk was the first."""
    request = state.requests[r]
    tenant = state.tenants[p, request.tenant]
    tenant.admitted -= admitted
    computed = min(start + count, request.prompt) - max(start, request.charged)
    tenant.counter += max(0, computed) * knobs.prefill_cost
