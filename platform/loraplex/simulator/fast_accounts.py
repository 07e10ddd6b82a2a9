"""The service of tenants by base in the fast simulator: ``tenancy.fairness`` in arrays, and who waits in the router.

Compiled; called by ``fast_router`` and ``fast_scheduler``.
"""

import numpy as np

from loraplex.router.prediction import decode_step_s
from loraplex.simulator.compiled import inlined, inner
from loraplex.simulator.fast_state import State

_decode_step_s = inlined(decode_step_s)


@inner
def enter_account(state: State, b: int, t: int) -> None:
    """A request of a tenant came; one that was away is lifted to the least of those that are there."""
    account = state.accounts[b, t]
    if account.num_active == 0:
        count = state.num_active[b]
        least = np.inf
        for index in range(count):
            least = min(least, state.accounts[b, state.accounts[b, index].active].seconds)
        if count > 0:
            account.seconds = max(account.seconds, least)
        account.expected = 0.0
        account.position = count
        state.accounts[b, count].active = t
        state.num_active[b] = count + 1
    account.num_active += 1


@inner
def leave_account(state: State, b: int, t: int) -> None:
    """It ended. When nobody is left all start anew."""
    account = state.accounts[b, t]
    account.num_active -= 1
    if account.num_active > 0:
        return
    last = state.num_active[b] - 1
    state.num_active[b] = last
    moved = state.accounts[b, last].active
    state.accounts[b, account.position].active = moved
    state.accounts[b, moved].position = account.position
    if last == 0:
        for index in range(state.accounts.shape[1]):
            state.accounts[b, index].seconds = 0.0


@inlined
def expect_of_account(state: State, p: int, r: int) -> None:
    """A request was sent to a replica: what it is predicted to take counts for its tenant."""
    request, view, rows = state.requests[r], state.views[p], float(state.load[p])
    output = state.mean_output[request.base]
    context = view.prompts + 0.5 * output * rows
    decode_s = _decode_step_s(view.step_s, view.row_s, view.context_token_s, rows, context)
    request.token_service_s = decode_s / rows
    request.prompt_service_s = view.token_s * request.prompt
    request.expected_service_s = request.prompt_service_s + output * request.token_service_s
    state.accounts[request.base, request.tenant].expected += request.expected_service_s


@inlined
def settle_account(state: State, r: int) -> None:
    """It ended: the tenant pays for what it got instead."""
    request = state.requests[r]
    account = state.accounts[request.base, request.tenant]
    account.expected -= request.expected_service_s
    account.seconds += request.prompt_service_s + request.output * request.token_service_s
    leave_account(state, request.base, request.tenant)


@inlined
def begin_wait(state: State, r: int) -> None:
    """A request waits in the router."""
    request = state.requests[r]
    state.queue[request.base, state.queue_size[request.base]] = r
    state.queue_size[request.base] += 1
    account = state.accounts[request.base, request.tenant]
    if account.num_waiting == 0:
        account.waits_since = r
        state.num_tenants_waiting[request.base] += 1
    account.num_waiting += 1


@inlined
def end_wait(state: State, r: int) -> None:
    """It waits no more; the caller takes it out of the queue."""
    request = state.requests[r]
    account = state.accounts[request.base, request.tenant]
    account.num_waiting -= 1
    if account.num_waiting == 0:
        state.num_tenants_waiting[request.base] -= 1


@inlined
def num_ahead(state: State, b: int, t: int) -> int:
    """How many go before a new request of the tenant, if all tenants take turns."""
    waiting = state.accounts[b, t].num_waiting
    others = state.num_tenants_waiting[b] - (1 if waiting > 0 else 0)
    return int(min(state.queue_size[b], waiting + (waiting + 1) * others))
