"""The router of the fast simulator: ``router.policy.choose_replica`` in arrays, and the queue of who finds no credit.

``choose`` is held equal to the policy by a test. Compiled; called by ``fast``.
"""

import numpy as np

from loraplex.router.prediction import LOAD_SHARE, decode_step_s, first_token_s
from loraplex.simulator.compiled import inlined, inner
from loraplex.simulator.fast_accounts import (
    begin_wait,
    end_wait,
    enter_account,
    expect_of_account,
    leave_account,
    num_ahead,
)
from loraplex.simulator.fast_memory import num_pages_for, pages_of_adapter
from loraplex.simulator.fast_scheduler import enqueue
from loraplex.simulator.fast_state import NONE, Knobs, State
from loraplex.simulator.fast_steps import arrived
from loraplex.simulator.types import Outcome

_REFUSED, _IMPOSSIBLE = int(Outcome.REFUSED), int(Outcome.IMPOSSIBLE)
_decode_step_s, _first_token_s = inlined(decode_step_s), inlined(first_token_s)
_FULL = np.int64(1) << 62


@inner
def choose(state: State, knobs: Knobs, r: int) -> int:
    """The replica for a request; NONE when no candidate has a credit."""
    request = state.requests[r]
    adapter = request.adapter
    first, end = state.first_candidate[request.key], state.first_candidate[request.key + 1]
    output = state.mean_output[request.base]
    least_home, least_other = np.inf, np.inf
    sharing = 1.0
    if adapter != NONE:
        for index in range(first, end):
            sharing += LOAD_SHARE * state.pairs[adapter, state.candidates[index].replica].sent
    for index in range(first, end):
        p = state.candidates[index].replica
        score = np.inf
        if state.load[p] < knobs.max_unfinished:
            first_s, decode_s = _predict(state, p, request.prompt, output)
            score = first_s + knobs.decode_weight * output * decode_s
            if _is_home(state, adapter, p):
                least_home = min(least_home, score)
            else:
                score += _absence_s(state, knobs, adapter, p) / sharing
                least_other = min(least_other, score)
        state.scores[index - first] = score
    if least_home == np.inf and least_other == np.inf:
        return NONE
    at_home = least_home <= least_other + knobs.alike_s
    least = least_home if at_home else least_other
    most = least + knobs.alike_s
    by_request = adapter == NONE or state.is_listed[request.key]
    best, best_affinity = NONE, -np.inf
    for index in range(first, end):
        candidate = state.candidates[index]
        p = candidate.replica
        if state.scores[index - first] > most or _is_home(state, adapter, p) != at_home:
            continue
        affinity = candidate.weight / -np.log(uniform(r, state.views[p].key)) if by_request else candidate.home
        if affinity > best_affinity:
            best, best_affinity = p, affinity
    return best


@inlined
def _is_home(state: State, adapter: int, p: int) -> bool:
    """Whether the adapter is on the replica, or will be for a request that was sent there."""
    return bool(adapter == NONE or state.seen[adapter, p] != 0)


@inlined
def _predict(state: State, p: int, new_tokens: float, output: float) -> tuple[float, float]:
    """``router.policy.predict``: (seconds to the first token, seconds of each step after it)."""
    view, rows = state.views[p], float(state.load[p])
    context = view.prompts + 0.5 * output * rows
    decode_s = _decode_step_s(view.step_s, view.row_s, view.context_token_s, rows + 1.0, context + new_tokens)
    first_s = _first_token_s(
        decode_s,
        view.prefill_s,
        view.token_s,
        view.free_tokens,
        view.max_step_tokens,
        view.max_running,
        rows,
        view.queued,
        context,
        view.room,
        new_tokens,
        output,
    )
    return first_s, decode_s


@inlined
def _absence_s(state: State, knobs: Knobs, adapter: int, p: int) -> float:
    known = state.adapters[state.replicas[p].cost, adapter]
    seconds = known.load_s
    if knobs.fetches and state.pairs[adapter, p].fetched_s == np.inf:
        seconds += known.fetch_s
    return float(seconds)


@inlined
def uniform(key: int, replica_key: int) -> float:
    """In (0, 1), by two keys: ``router.policy.rendezvous`` is weight / -ln of it."""
    z = np.uint64(key) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(replica_key) * np.uint64(0xD1B54A32D192ED03)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return (np.float64(z >> np.uint64(12)) + 0.5) * 2.0**-52


@inlined
def arrive(state: State, knobs: Knobs, r: int, now_s: float) -> None:
    """A request comes to the router."""
    request = state.requests[r]
    base = request.base
    if state.first_candidate[request.key] == state.first_candidate[request.key + 1]:
        request.outcome = _IMPOSSIBLE
        return
    _expire(state, knobs, base, now_s)
    p = choose(state, knobs, r)
    if knobs.patience_s < np.inf and _first_s(state, knobs, r, p) > knobs.patience_s:
        request.outcome = _REFUSED
        return
    if p == NONE and state.queue_size[base] >= knobs.max_queued:
        victim = _makes_way(state, base, request.tenant)
        if victim == NONE:
            request.outcome = _REFUSED
            return
        other = state.queue[base, victim]
        state.requests[other].outcome = _REFUSED
        leave_account(state, base, state.requests[other].tenant)
        _take_out(state, base, victim)
    enter_account(state, base, request.tenant)
    if p == NONE:
        begin_wait(state, r)
    else:
        _place(state, knobs, r, p, now_s)


@inner
def pump(state: State, knobs: Knobs, p: int, now_s: float) -> None:
    """A replica may have room: those that wait and may run there go, the tenant that had least of the base first."""
    base = state.replicas[p].base
    _expire(state, knobs, base, now_s)
    while state.queue_size[base] > 0 and state.load[p] < knobs.max_unfinished:
        best, least_s = NONE, np.inf
        for index in range(state.queue_size[base]):
            request = state.requests[state.queue[base, index]]
            account = state.accounts[base, request.tenant]
            service_s = account.seconds + account.expected
            if service_s < least_s and _is_candidate(state, request.key, p):
                best, least_s = index, service_s
        if best == NONE:
            return
        r = state.queue[base, best]
        _take_out(state, base, best)
        _place(state, knobs, r, choose(state, knobs, r), now_s)


@inner
def refuse_all(state: State) -> None:
    """Nothing will happen any more: who still waits, waits in vain."""
    for base in range(len(state.queue_size)):
        for index in range(state.queue_size[base]):
            request = state.requests[state.queue[base, index]]
            request.outcome = _REFUSED
            leave_account(state, base, request.tenant)
        state.queue_size[base] = 0


@inner
def _place(state: State, knobs: Knobs, r: int, p: int, now_s: float) -> None:
    """Sends a request to a replica."""
    replica, request = state.replicas[p], state.requests[r]
    request.output = min(request.output, replica.max_context - request.prompt)
    pages = pages_of_adapter(state, p, request.adapter) if request.adapter != NONE else 0
    needed = num_pages_for(request.prompt + request.output - 1) + pages
    if request.output < 1 or needed > replica.num_pages or pages > replica.max_adapter_pages:
        request.outcome = _IMPOSSIBLE
        leave_account(state, request.base, request.tenant)
        return
    ready_s = enqueue(state, knobs, p, r, now_s)
    expect_of_account(state, p, r)
    arrived(state, knobs, p, now_s, ready_s)


@inner
def _first_s(state: State, knobs: Knobs, r: int, p: int) -> float:
    """Predicted time to the first token of a request on its replica; NONE: no candidate has a credit."""
    request = state.requests[r]
    output = state.mean_output[request.base]
    if p != NONE:
        first_s, _ = _predict(state, p, request.prompt, output)
        return float(
            first_s if _is_home(state, request.adapter, p) else first_s + _absence_s(state, knobs, request.adapter, p)
        )
    soonest_s, ends_per_s = np.inf, 0.0
    for index in range(state.first_candidate[request.key], state.first_candidate[request.key + 1]):
        p = state.candidates[index].replica
        first_s, _ = _predict(state, p, request.prompt, output)
        soonest_s = min(soonest_s, first_s)
        view, rows = state.views[p], float(state.load[p])
        context = view.prompts + 0.5 * output * rows
        decode_s = _decode_step_s(view.step_s, view.row_s, view.context_token_s, rows, context)
        ends_per_s += min(rows, view.max_running) / (output * decode_s)
    return float(soonest_s + num_ahead(state, request.base, request.tenant) / ends_per_s)


@inner
def _makes_way(state: State, base: int, tenant: int) -> int:
    """``router.queue.makes_way``: the place in the queue."""
    greatest, most, since = NONE, 0, 0
    for index in range(state.queue_size[base]):
        owner = state.requests[state.queue[base, index]].tenant
        account = state.accounts[base, owner]
        if account.num_waiting > most or (account.num_waiting == most and account.waits_since < since):
            greatest, most, since = owner, account.num_waiting, account.waits_since
    if most <= state.accounts[base, tenant].num_waiting + 1:
        return NONE
    index = state.queue_size[base] - 1
    while state.requests[state.queue[base, index]].tenant != greatest:
        index -= 1
    return int(index)


@inlined
def _take_out(state: State, base: int, position: int) -> None:
    """Of the queue."""
    end_wait(state, state.queue[base, position])
    state.queue_size[base] -= 1
    for index in range(position, state.queue_size[base]):
        state.queue[base, index] = state.queue[base, index + 1]


@inlined
def _expire(state: State, knobs: Knobs, base: int, now_s: float) -> None:
    """They wait in order of arrival, so those that waited too long come first."""
    count = 0
    while count < state.queue_size[base]:
        request = state.requests[state.queue[base, count]]
        if request.arrival_s + min(knobs.max_queue_wait_s, knobs.patience_s) > now_s:
            break
        request.outcome = _REFUSED
        end_wait(state, state.queue[base, count])
        leave_account(state, base, request.tenant)
        count += 1
    if count > 0:
        state.queue_size[base] -= count
        for index in range(state.queue_size[base]):
            state.queue[base, index] = state.queue[base, index + count]


@inlined
def _is_candidate(state: State, key: int, p: int) -> bool:
    low, high = state.first_candidate[key], state.first_candidate[key + 1]
    while low < high:
        middle = (low + high) // 2
        if state.candidates[middle].replica < p:
            low = middle + 1
        else:
            high = middle
    return bool(low < state.first_candidate[key + 1] and state.candidates[low].replica == p)
