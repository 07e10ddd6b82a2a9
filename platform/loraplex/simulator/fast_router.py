"""The router of the fast simulator: ``router.policy.choose_replica`` in arrays, and the queue of who finds no credit.

``choose`` is held equal to the policy by a test. Compiled; called by ``fast``.
"""

import numpy as np

from loraplex.router.prediction import decode_step_s, first_token_s
from loraplex.simulator.compiled import inlined, inner
from loraplex.simulator.fast_memory import num_pages_for, pages_of_adapter
from loraplex.simulator.fast_scheduler import enqueue
from loraplex.simulator.fast_state import NONE, Knobs, State
from loraplex.simulator.fast_steps import arrived
from loraplex.simulator.types import Outcome

_REFUSED, _IMPOSSIBLE = int(Outcome.REFUSED), int(Outcome.IMPOSSIBLE)
_decode_step_s, _first_token_s = inlined(decode_step_s), inlined(first_token_s)
_FULL = np.int64(1) << 62


@inlined
def choose(state: State, knobs: Knobs, r: int) -> int:
    """The replica for a request; NONE when no candidate has a credit."""
    request = state.requests[r]
    adapter = request.adapter
    first, end = state.first_candidate[request.key], state.first_candidate[request.key + 1]
    output = state.mean_output[request.base]
    least_home, least_other = np.inf, np.inf
    for index in range(first, end):
        p = state.candidates[index].replica
        score = np.inf
        if state.load[p] < knobs.max_unfinished:
            score = _score_s(state, knobs, p, request.prompt, output)
            if _is_home(state, adapter, p):
                least_home = min(least_home, score)
            else:
                score += _absence_s(state, adapter, p)
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
    return bool(adapter == NONE or state.seen[adapter, p] or state.pairs[adapter, p].sent > 0)


@inlined
def _score_s(state: State, knobs: Knobs, p: int, new_tokens: float, output: float) -> float:
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
    return float(first_s + knobs.decode_weight * output * decode_s)


@inlined
def _absence_s(state: State, adapter: int, p: int) -> float:
    known = state.adapters[state.replicas[p].cost, adapter]
    seconds = known.load_s
    if state.pairs[adapter, p].fetched_s == np.inf:
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
    if state.queue_size[base] > 0 or not _place(state, knobs, r, now_s):
        if state.queue_size[base] >= knobs.max_queued:
            request.outcome = _REFUSED
        else:
            state.queue[base, state.queue_size[base]] = r
            state.queue_size[base] += 1


@inner
def pump(state: State, knobs: Knobs, p: int, now_s: float) -> None:
    """A replica may have room: those that wait and may run there go, the tenant with the fewest requests on replicas
    first."""
    base = state.replicas[p].base
    _expire(state, knobs, base, now_s)
    while state.queue_size[base] > 0 and state.load[p] < knobs.max_unfinished:
        best = NONE
        fewest = _FULL
        for index in range(state.queue_size[base]):
            request = state.requests[state.queue[base, index]]
            if state.placed[base, request.tenant] < fewest and _is_candidate(state, request.key, p):
                best, fewest = index, state.placed[base, request.tenant]
        if best == NONE or not _place(state, knobs, state.queue[base, best], now_s):
            return
        state.queue_size[base] -= 1
        for index in range(best, state.queue_size[base]):
            state.queue[base, index] = state.queue[base, index + 1]


@inner
def refuse_all(state: State) -> None:
    """Nothing will happen any more: who still waits, waits in vain."""
    for base in range(len(state.queue_size)):
        for index in range(state.queue_size[base]):
            state.requests[state.queue[base, index]].outcome = _REFUSED
        state.queue_size[base] = 0


@inner
def _place(state: State, knobs: Knobs, r: int, now_s: float) -> bool:
    """Sends a request to the replica of the router's choice; False when none has a credit."""
    p = choose(state, knobs, r)
    if p == NONE:
        return False
    replica, request = state.replicas[p], state.requests[r]
    request.output = min(request.output, replica.max_context - request.prompt)
    pages = pages_of_adapter(state, p, request.adapter) if request.adapter != NONE else 0
    needed = num_pages_for(request.prompt + request.output - 1) + pages
    if request.output < 1 or needed > replica.num_pages or pages > replica.max_adapter_pages:
        request.outcome = _IMPOSSIBLE
        return True
    state.placed[request.base, request.tenant] += 1
    arrived(state, knobs, p, now_s, enqueue(state, knobs, p, r, now_s))
    return True


@inlined
def _expire(state: State, knobs: Knobs, base: int, now_s: float) -> None:
    """They wait in order of arrival, so those that waited too long come first."""
    count = 0
    while count < state.queue_size[base]:
        request = state.requests[state.queue[base, count]]
        if request.arrival_s + knobs.max_queue_wait_s > now_s:
            break
        request.outcome = _REFUSED
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
