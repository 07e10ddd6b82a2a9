"""Which requests a step of the fast simulator computes: ``engine.scheduler`` in counts. Compiled; called by
``fast_steps`` and ``fast_router``.
"""

import numpy as np

from loraplex.router.prediction import OUTPUT_SHARE
from loraplex.simulator.cluster import PAGE_SIZE
from loraplex.simulator.compiled import inlined, inner
from loraplex.simulator.fast_accounts import settle_account
from loraplex.simulator.fast_ends import first_end_at, num_ends_at, position_of_end, push_end, remove_end
from loraplex.simulator.fast_memory import (
    end_idle,
    forget_kv,
    is_short,
    keep_kv,
    load_adapter,
    make_idle,
    num_available,
    num_pages_for,
    pages_of_adapter,
    take,
)
from loraplex.simulator.fast_rows import put_in_row_order, take_out_of_rows
from loraplex.simulator.fast_state import NONE, REPORTED, SENT, Knobs, State
from loraplex.simulator.fast_turns import enter_turns, leave_turns, owe, pay, service_of


@inlined
def enqueue(state: State, knobs: Knobs, p: int, r: int, now_s: float) -> float:
    """A request comes to a replica; when its adapter lies in host memory."""
    replica, request = state.replicas[p], state.requests[r]
    request.replica = p
    request.known = request.prompt
    request.since_s = now_s
    state.slots[p, replica.num_waiting].waiting = r
    replica.num_waiting += 1
    state.load[p] += 1
    view = state.views[p]
    view.queued += request.prompt
    view.prompts += request.prompt
    request.order = replica.num_sent
    replica.num_sent += 1
    enter_turns(state, knobs, p, request.tenant, now_s)
    if request.adapter == NONE:
        return now_s
    pair = state.pairs[request.adapter, p]
    pair.sent += 1
    state.seen[request.adapter, p] |= SENT
    if not knobs.fetches:
        return now_s
    if pair.fetched_s == np.inf:
        fetch_s = state.adapters[replica.cost, request.adapter].fetch_s
        replica.fetch_free_s = max(now_s, replica.fetch_free_s) + fetch_s
        pair.fetched_s = replica.fetch_free_s
    request.since_s = max(now_s, pair.fetched_s)
    return float(request.since_s)


@inlined
def clear_plan(state: State, p: int, slot: int) -> None:
    plan = state.plans[p, slot]
    plan.size = 0
    plan.rows = plan.tokens = plan.pairs = plan.single_rows = plan.kv_tokens = plan.lora_tokens = 0.0
    plan.ready_s = 0.0
    state.replicas[p].stamp += 1


@inner
def plan_step(state: State, knobs: Knobs, p: int, slot: int, now_s: float, admitting: bool) -> None:
    """Fills plan ``slot`` of a replica with chunks of prompts, of running and newly admitted requests."""
    replica = state.replicas[p]
    clear_plan(state, p, slot)
    if replica.num_prefilling == 0 and (not admitting or replica.num_waiting == 0):
        return
    fill_step(state, knobs, p, slot, now_s, knobs.max_step_tokens - _num_decodes(state, p, slot), admitting)


@inner
def fill_step(state: State, knobs: Knobs, p: int, slot: int, now_s: float, budget: int, admitting: bool) -> None:
    """Up to ``budget`` tokens of prompts into plan ``slot``."""
    replica = state.replicas[p]
    for index in range(replica.num_prefilling):
        r = state.slots[p, index].prefilling
        left = state.requests[r].known - state.requests[r].scheduled
        if left > 0 and budget > 0:
            budget -= _add_chunk(state, p, slot, r, min(left, budget), 0.0)
    if not admitting:
        return
    while budget > 0 and replica.num_waiting > 0 and replica.num_running < knobs.max_running:
        index = _next_waiting(state, knobs, p, now_s)
        if index == NONE:
            return
        r = state.slots[p, index].waiting
        reserve = (replica.num_running + 3) // 4
        if is_short(state, p, r, reserve):
            if state.requests[r].since_s + knobs.overdue_s <= now_s:
                return
            state.requests[r].passed = replica.stamp
            continue
        replica.num_waiting -= 1
        state.slots[p, index].waiting = state.slots[p, replica.num_waiting].waiting
        _admit(state, p, r, slot, now_s)
        left = state.requests[r].known - state.requests[r].scheduled
        budget -= _add_chunk(state, p, slot, r, min(left, budget), owe(state, knobs, p, r))


@inlined
def _num_decodes(state: State, p: int, slot: int) -> int:
    """Requests that draw one more token in the step of plan ``slot``, which may be the one after that under way."""
    replica = state.replicas[p]
    if slot == replica.slot:
        return int(replica.num_decoding)
    count = replica.num_decoding - num_ends_at(state, p, replica.step + 1)
    for index in range(state.plans[p, replica.slot].size):
        chunk = state.chunks[p, replica.slot, index]
        request = state.requests[chunk.request]
        if chunk.start + chunk.count == request.known and request.generated + 1 < request.output:
            count += 1
    return int(count)


@inlined
def chunk_done(state: State, knobs: Knobs, p: int, slot: int, index: int, now_s: float) -> None:
    """A step that held prompt tokens of a request ended: those of chunk ``index`` of plan ``slot``."""
    chunk = state.chunks[p, slot, index]
    r = chunk.request
    request = state.requests[r]
    pay(state, knobs, p, r, chunk.start, chunk.count, chunk.admitted)
    request.planned -= 1
    state.views[p].queued -= chunk.count
    if request.planned > 0 or request.scheduled < request.known:
        return
    leave_prefilling(state, p, r)
    if request.generated == 0:
        request.first_s = now_s
    _begin_decoding(state, knobs, p, r)
    push_end(state, p, r, request.last_step)


@inlined
def finish_due(state: State, knobs: Knobs, p: int, now_s: float) -> None:
    """Ends the requests whose last step was the one that ended now, in the order of its rows."""
    replica = state.replicas[p]
    index = first_end_at(state, p, replica.step)
    while index != NONE:
        r = state.slots[p, index].end_request
        remove_end(state, p, index)
        finish(state, knobs, p, r, now_s)
        index = first_end_at(state, p, replica.step)


@inner
def finish(state: State, knobs: Knobs, p: int, r: int, now_s: float) -> None:
    request = state.requests[r]
    request.end_s = now_s
    if state.replicas[p].num_stages == 1:
        _stop(state, knobs, p, r)
    else:
        leave_pipeline(state, knobs, p, r)
    state.load[p] -= 1
    state.views[p].prompts -= request.prompt
    if request.adapter != NONE:
        pair = state.pairs[request.adapter, p]
        pair.sent -= 1
        if pair.sent == 0:
            state.seen[request.adapter, p] &= REPORTED
    state.mean_output[request.base] += OUTPUT_SHARE * (request.output - state.mean_output[request.base])
    settle_account(state, r)
    leave_turns(state, p, request.tenant)


@inner
def latest_decoding(state: State, p: int) -> int:
    """Of the requests that draw tokens, the one that came last; NONE if there is none."""
    latest = NONE
    for index in range(state.replicas[p].num_running):
        r = state.slots[p, index].running
        if state.requests[r].start_step != NONE and (
            latest == NONE or state.requests[r].order > state.requests[latest].order
        ):
            latest = r
    return latest


@inner
def preempt_latest(state: State, knobs: Knobs, p: int, now_s: float) -> None:
    """The decoding request that came last gives its pages up and waits again, before all others."""
    victim = latest_decoding(state, p)
    request = state.requests[victim]
    generated = request.generated + 1 + state.replicas[p].step - request.start_step
    remove_end(state, p, position_of_end(state, p, victim))
    _stop(state, knobs, p, victim)
    wait_again(state, p, victim, generated)


@inner
def leave_pipeline(state: State, knobs: Knobs, p: int, r: int) -> None:
    """A request that draws tokens in a pipeline gives back its pages and its adapter; full pages are kept."""
    replica, request = state.replicas[p], state.requests[r]
    # The last token is not computed.
    sealed = (request.known + request.drawn - 1) // PAGE_SIZE if knobs.prefix_cache else 0
    replica.num_free += request.pages - sealed
    keep_kv(state, p, r, sealed)
    request.start_step = NONE
    take_out_of_rows(state, p, r)
    if request.adapter != NONE:
        pair = state.pairs[request.adapter, p]
        pair.users -= 1
        if pair.users == 0:
            make_idle(state, p, request.adapter)


@inner
def wait_again(state: State, p: int, victim: int, generated: int) -> None:
    """It was preempted after ``generated`` tokens."""
    replica, request = state.replicas[p], state.requests[victim]
    request.generated = generated
    request.known = request.prompt + generated
    request.charged = request.known - 1
    request.since_s = -np.inf
    state.views[p].queued += request.known
    state.slots[p, replica.num_waiting].waiting = victim
    replica.num_waiting += 1
    replica.num_preemptions += 1


@inlined
def report(state: State, p: int) -> None:
    """The router hears which adapters became resident, and how many pages could be had."""
    replica = state.replicas[p]
    for index in range(replica.num_fresh):
        adapter = state.slots[p, index].fresh
        if state.pairs[adapter, p].resident:
            state.seen[adapter, p] |= REPORTED
    replica.num_fresh = 0
    state.views[p].room = num_available(state, p) * PAGE_SIZE


@inlined
def _next_waiting(state: State, knobs: Knobs, p: int, now_s: float) -> int:
    """Position of who is admitted next, of those whose adapter is in host memory and that this plan did not pass."""
    replica = state.replicas[p]
    best, best_score, best_order = NONE, np.inf, NONE
    for index in range(replica.num_waiting):
        r = state.slots[p, index].waiting
        request = state.requests[r]
        if request.passed == replica.stamp or request.since_s > now_s:
            continue
        if request.since_s == -np.inf:
            score = -np.inf
        else:
            score = (
                service_of(state, knobs, p, request.tenant, replica.step) + state.tenants[p, request.tenant].admitted
            )
            is_overdue = request.since_s + knobs.overdue_s <= now_s
            if request.adapter != NONE and not is_overdue and state.pairs[request.adapter, p].users == 0:
                score += pages_of_adapter(state, p, request.adapter) * knobs.page_price
        if best == NONE or score < best_score or (score == best_score and request.order < best_order):
            best, best_score, best_order = index, score, request.order
    return best


@inlined
def _admit(state: State, p: int, r: int, slot: int, now_s: float) -> None:
    replica, request = state.replicas[p], state.requests[r]
    shared = request.cached
    if shared > 0:
        forget_kv(state, p, r)
        replica.num_cached -= shared
        request.cached = 0
    if request.adapter != NONE:
        pair = state.pairs[request.adapter, p]
        if not pair.resident:
            plan = state.plans[p, slot]
            plan.ready_s = max(plan.ready_s, load_adapter(state, p, request.adapter, now_s))
        if pair.users == 0:
            end_idle(state, p, request.adapter)
        pair.users += 1
    take(state, p, num_pages_for(request.known) - shared)
    request.scheduled = shared * PAGE_SIZE
    state.views[p].queued -= request.scheduled
    request.start_step = NONE
    request.planned = 0
    request.position = replica.num_running
    state.slots[p, replica.num_running].running = r
    replica.num_running += 1
    if replica.num_stages > 1:
        request.pages, request.draws, request.drawn = num_pages_for(request.known), 0, 0
        put_in_row_order(state, p, r)
    state.slots[p, replica.num_prefilling].prefilling = r
    replica.num_prefilling += 1


@inlined
def _add_chunk(state: State, p: int, slot: int, r: int, count: int, admitted: float) -> int:
    plan, request = state.plans[p, slot], state.requests[r]
    chunk = state.chunks[p, slot, plan.size]
    start = request.scheduled
    chunk.request, chunk.start, chunk.count, chunk.admitted = r, start, count, admitted
    plan.size += 1
    request.scheduled += count
    request.planned += 1
    if count > 1:
        plan.rows += 1.0
        plan.tokens += count
        plan.pairs += count * start + 0.5 * count * (count + 1)
    else:
        plan.single_rows += 1.0
    plan.kv_tokens += start + count
    if request.adapter != NONE:
        plan.lora_tokens += count
    return count


@inlined
def _begin_decoding(state: State, knobs: Knobs, p: int, r: int) -> None:
    """Its prompt was computed in the step that ended now, and its next token drawn."""
    replica, request = state.replicas[p], state.requests[r]
    request.start_step = replica.step
    request.last_step = replica.step + request.output - request.generated - 1
    replica.num_decoding += 1
    replica.decode_offset += request.known - replica.step
    state.phases[p, (request.known - 1 - replica.step) % PAGE_SIZE] += 1
    for step in range(replica.step + 1, replica.paged_step + 1):
        if (request.known - 1 - replica.step + step) % PAGE_SIZE == 0:
            take(state, p, 1)
    tenant = state.tenants[p, request.tenant]
    tenant.num_decoding += 1
    # Drawing that token is paid as well.
    tenant.counter -= knobs.decode_cost * (replica.step - 1)
    if request.adapter != NONE:
        replica.decode_lora += 1
        pair = state.pairs[request.adapter, p]
        if pair.decoding == 0:
            replica.decode_adapters += 1
            replica.decode_bytes += state.adapters[replica.cost, request.adapter].whole_bytes
        pair.decoding += 1


@inner
def _stop(state: State, knobs: Knobs, p: int, r: int) -> None:
    """A decoding request gives back its pages and its adapter; full pages are kept for their content."""
    replica, request = state.replicas[p], state.requests[r]
    steps = replica.step - request.start_step
    held = num_pages_for(request.known + max(steps, replica.paged_step - request.start_step))
    sealed = (request.known + steps) // PAGE_SIZE if knobs.prefix_cache else 0
    replica.num_free += held - sealed
    keep_kv(state, p, r, sealed)
    replica.num_decoding -= 1
    replica.decode_offset -= request.known - request.start_step
    state.phases[p, (request.known - 1 - request.start_step) % PAGE_SIZE] -= 1
    tenant = state.tenants[p, request.tenant]
    tenant.num_decoding -= 1
    tenant.counter += knobs.decode_cost * replica.step
    request.start_step = NONE
    replica.num_running -= 1
    moved = state.slots[p, replica.num_running].running
    state.slots[p, request.position].running = moved
    state.requests[moved].position = request.position
    if request.adapter == NONE:
        return
    pair = state.pairs[request.adapter, p]
    replica.decode_lora -= 1
    pair.decoding -= 1
    if pair.decoding == 0:
        replica.decode_adapters -= 1
        replica.decode_bytes -= state.adapters[replica.cost, request.adapter].whole_bytes
    pair.users -= 1
    if pair.users == 0:
        make_idle(state, p, request.adapter)


@inlined
def leave_prefilling(state: State, p: int, r: int) -> None:
    replica = state.replicas[p]
    index = 0
    while state.slots[p, index].prefilling != r:
        index += 1
    replica.num_prefilling -= 1
    for position in range(index, replica.num_prefilling):
        state.slots[p, position].prefilling = state.slots[p, position + 1].prefilling


@inner
def next_fetched_s(state: State, knobs: Knobs, p: int, now_s: float) -> float:
    """When the first adapter that is on its way to host memory gets there; infinite: none is awaited."""
    soonest_s = np.inf
    if knobs.fetches:
        for index in range(state.replicas[p].num_waiting):
            since_s = state.requests[state.slots[p, index].waiting].since_s
            if since_s > now_s:
                soonest_s = min(soonest_s, since_s)
    return soonest_s
