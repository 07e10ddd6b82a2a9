"""Steps of a replica with several stages, of the fast simulator: as many in flight as stages, or one more.

Steps overlap and each holds a share of the decoding requests, so they are counted row by row and no runs are summed.
The rules are those of ``engine.scheduler`` for stages, of ``stages`` for when a step begins and ends, and of
``model_runner.turns``. Compiled; called by ``fast_steps``.
"""

import numpy as np

from loraplex.simulator.cluster import PAGE_SIZE
from loraplex.simulator.compiled import inlined, inner
from loraplex.simulator.fast_device import hand_over, has_turn, is_wanted, take_turn
from loraplex.simulator.fast_memory import num_available, take
from loraplex.simulator.fast_scheduler import (
    clear_plan,
    fill_step,
    finish,
    latest_decoding,
    leave_pipeline,
    leave_prefilling,
    next_fetched_s,
    report,
    wait_again,
)
from loraplex.simulator.fast_state import NONE, Knobs, State
from loraplex.simulator.fast_turns import pay
from loraplex.simulator.step_time import seconds_of


@inner
def arrived_in_pipeline(state: State, knobs: Knobs, p: int, now_s: float, ready_s: float) -> None:
    """A request that can be admitted from ``ready_s`` on came; while steps are in flight their end is waited for."""
    replica = state.replicas[p]
    if replica.num_in_flight > 0 or replica.waits:
        return
    if ready_s <= now_s:
        _fill(state, knobs, p, now_s)
    else:
        state.wake_s[p] = min(state.wake_s[p], ready_s)


@inner
def pipeline_step_done(state: State, knobs: Knobs, p: int, now_s: float) -> None:
    """The oldest step in flight has ended; where none is, an adapter has come to host memory."""
    replica = state.replicas[p]
    if replica.num_in_flight == 0:
        _fill(state, knobs, p, now_s)
        return
    slot = _slot(state, replica.num_planned - replica.num_in_flight + 1)
    replica.num_in_flight -= 1
    replica.expects_others = False
    if replica.num_in_flight == 0:
        replica.num_in_turn = 0
        following = hand_over(state, p)
        if following != NONE:
            state.replicas[following].expects_others = True
            _begin_step(state, following, now_s + max(knobs.turn_s, state.replicas[following].alone_s))
            _fill(state, knobs, following, now_s)
    plan = state.plans[p, slot]
    for index in range(plan.size):
        _chunk_done(state, knobs, p, slot, index, now_s)
    for index in range(plan.num_rows):
        _token_drawn(state, knobs, p, state.rows[p, slot, index], now_s)
    report(state, p)
    _fill(state, knobs, p, now_s)


@inlined
def _slot(state: State, step: int) -> int:
    return int(step % state.plans.shape[1])


@inner
def _chunk_done(state: State, knobs: Knobs, p: int, slot: int, index: int, now_s: float) -> None:
    chunk = state.chunks[p, slot, index]
    r = chunk.request
    request = state.requests[r]
    pay(state, knobs, p, r, chunk.start, chunk.count, chunk.admitted)
    state.views[p].queued -= chunk.count
    if chunk.start + chunk.count < request.known:
        request.planned -= 1
        return
    leave_prefilling(state, p, r)
    request.start_step = 0
    if request.generated == 0:
        request.first_s = now_s
    _token_drawn(state, knobs, p, r, now_s)


@inner
def _token_drawn(state: State, knobs: Knobs, p: int, r: int, now_s: float) -> None:
    request = state.requests[r]
    request.planned -= 1
    request.drawn += 1
    state.tenants[p, request.tenant].counter += knobs.decode_cost
    if request.generated + request.drawn == request.output:
        finish(state, knobs, p, r, now_s)


@inner
def _fill(state: State, knobs: Knobs, p: int, now_s: float) -> None:
    """Plans and begins steps as long as there is something to compute and room for them."""
    replica = state.replicas[p]
    while replica.num_in_flight < _max_in_flight(state, knobs, p):
        if not _plan_step(state, knobs, p, now_s):
            break
        wait_s = 0.0
        if replica.num_in_flight == 0:
            if not has_turn(state, p) and not take_turn(state, p):
                state.wake_s[p] = np.inf
                return
            wait_s = replica.alone_s
        _begin_step(state, p, now_s + wait_s)
    if replica.num_in_flight > 0:
        oldest = _slot(state, replica.num_planned - replica.num_in_flight + 1)
        state.wake_s[p] = state.plans[p, oldest].end_s
    else:
        state.wake_s[p] = next_fetched_s(state, knobs, p, now_s)


@inlined
def _max_in_flight(state: State, knobs: Knobs, p: int) -> int:
    replica = state.replicas[p]
    if replica.num_in_turn >= replica.num_stages and (replica.expects_others or is_wanted(state, p)):
        return int(replica.num_in_flight)
    return int(replica.num_stages + knobs.ahead)


@inner
def _begin_step(state: State, p: int, now_s: float) -> None:
    """That which was planned last: as ``stages.StageLine``."""
    replica = state.replicas[p]
    plan = state.plans[p, _slot(state, replica.num_planned)]
    begin_s = max(now_s, plan.ready_s, replica.line_free_s)
    if replica.num_planned > replica.num_stages:
        begin_s = max(begin_s, state.plans[p, _slot(state, replica.num_planned - replica.num_stages)].end_s)
    plan.end_s = max(begin_s + plan.latency_s, replica.last_end_s + plan.interval_s)
    replica.busy_s += plan.end_s - max(begin_s, replica.last_end_s)
    replica.num_steps += 1
    replica.line_free_s = begin_s + plan.interval_s
    replica.last_end_s = plan.end_s
    replica.num_in_flight += 1
    replica.num_in_turn += 1


@inner
def _plan_step(state: State, knobs: Knobs, p: int, now_s: float) -> bool:
    """The next step; False: there is nothing to compute, or pages lack beside steps in flight."""
    replica = state.replicas[p]
    slot = _slot(state, replica.num_planned + 1)
    plan = state.plans[p, slot]
    clear_plan(state, p, slot)
    admitting = True
    while not _take_rows(state, p, slot):
        if replica.num_in_flight > 0:
            return False
        _preempt_latest(state, knobs, p)
        admitting = replica.num_running == 0
    budget = (knobs.max_step_tokens + replica.num_stages - 1) // replica.num_stages - plan.num_rows
    fill_step(state, knobs, p, slot, now_s, budget, admitting)
    if plan.num_rows == 0 and plan.size == 0:
        return False
    replica.num_planned += 1
    _count_rows(state, p, slot)
    return True


@inner
def _take_rows(state: State, p: int, slot: int) -> bool:
    """A share of the decoding requests, of those whose token is there in time; False: a page is missing."""
    replica, plan = state.replicas[p], state.plans[p, slot]
    decoding = 0
    for index in range(replica.num_running):
        request = state.requests[state.slots[p, index].running]
        if request.scheduled >= request.known:
            decoding += 1
    most = max(1, (decoding + replica.num_stages - 1) // replica.num_stages)
    plan.num_rows = 0
    for index in range(replica.num_running):
        r = state.slots[p, index].running
        request = state.requests[r]
        if request.scheduled < request.known or request.generated + request.draws >= request.output:
            continue
        if plan.num_rows == most:
            break
        if request.planned > 0 and replica.num_planned + 1 - request.last_planned < replica.num_stages:
            continue
        if request.known + request.draws - 1 >= request.pages * PAGE_SIZE:
            if num_available(state, p) == 0:
                return False
            take(state, p, 1)
            request.pages += 1
        state.rows[p, slot, plan.num_rows] = r
        plan.num_rows += 1
    return True


@inner
def _count_rows(state: State, p: int, slot: int) -> None:
    """The step is planned: what its rows add to it, and how long it will take."""
    replica, plan = state.replicas[p], state.plans[p, slot]
    step = replica.num_planned
    num_adapters, adapter_bytes = 0.0, 0.0
    for index in range(plan.size + plan.num_rows):
        if index < plan.size:
            chunk = state.chunks[p, slot, index]
            request = state.requests[chunk.request]
            if chunk.start + chunk.count == request.known:
                request.draws += 1
        else:
            request = state.requests[state.rows[p, slot, index - plan.size]]
            plan.single_rows += 1.0
            plan.kv_tokens += request.known + request.draws
            if request.adapter != NONE:
                plan.lora_tokens += 1.0
            request.planned += 1
            request.draws += 1
        request.last_planned = step
        if request.adapter != NONE:
            pair = state.pairs[request.adapter, p]
            if pair.marked != step:
                pair.marked = step
                num_adapters += 1.0
                adapter_bytes += state.adapters[replica.cost, request.adapter].whole_bytes
    plan.latency_s = _seconds(state, p, slot, 0, num_adapters, adapter_bytes)
    plan.interval_s = _seconds(state, p, slot, 1, num_adapters, adapter_bytes)


@inner
def _seconds(state: State, p: int, slot: int, which: int, num_adapters: float, adapter_bytes: float) -> float:
    plan = state.plans[p, slot]
    return seconds_of(
        state.coefficients[state.replicas[p].cost, which],
        plan.rows,
        plan.tokens,
        plan.pairs,
        plan.single_rows,
        plan.kv_tokens,
        num_adapters,
        adapter_bytes,
        plan.lora_tokens,
    )


@inner
def _preempt_latest(state: State, knobs: Knobs, p: int) -> None:
    """Of those that draw tokens, the one that came last gives its pages up."""
    victim = latest_decoding(state, p)
    generated = state.requests[victim].generated + state.requests[victim].drawn
    leave_pipeline(state, knobs, p, victim)
    wait_again(state, p, victim, generated)
