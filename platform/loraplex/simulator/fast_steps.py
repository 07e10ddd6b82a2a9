"""Steps of the fast simulator: what ends, what is planned, how long the next run of steps takes.

While nothing but decoding goes on, all steps until the first request ends are one run: their times are an arithmetic
series, since only the context grows. What comes in between cuts the run at the end of a step. Compiled; called by
``fast_router`` and ``fast``.
"""

import numpy as np

from loraplex.cost.step_cost import StepCoefficients
from loraplex.simulator.compiled import inlined, inner
from loraplex.simulator.fast_memory import grow_until, num_available, pages_to_grow, steps_with_pages
from loraplex.simulator.fast_runs import run_s, steps_until
from loraplex.simulator.fast_scheduler import chunk_done, finish_due, plan_step, preempt_latest, report
from loraplex.simulator.fast_state import NONE, Knobs, State
from loraplex.simulator.step_time import step_time_s

_KV = StepCoefficients.__struct_fields__.index("kv_token_s")


@inlined
def arrived(state: State, knobs: Knobs, p: int, now_s: float, ready_s: float) -> None:
    """A request that can be admitted from ``ready_s`` on came to a replica."""
    replica = state.replicas[p]
    if replica.running:
        cut_run(state, p, ready_s)
    elif ready_s <= now_s:
        _begin(state, knobs, p, now_s)
    else:
        state.wake_s[p] = min(state.wake_s[p], ready_s)


@inner
def wake(state: State, knobs: Knobs, p: int) -> None:
    """The moment ``wake_s`` of a replica has come."""
    replica = state.replicas[p]
    now_s = state.wake_s[p]
    if not replica.running:
        _begin(state, knobs, p, now_s)
        return
    replica.step += replica.run_count
    replica.num_steps += replica.run_count
    replica.busy_s += now_s - replica.run_start_s
    grow_until(state, p, replica.step)
    replica.running = False
    slot = replica.slot
    for index in range(state.plans[p, slot].size):
        chunk_done(state, knobs, p, slot, index, now_s)
    state.plans[p, slot].size = 0
    finish_due(state, knobs, p, now_s)
    report(state, p)
    if knobs.ahead:
        replica.slot = 1 - slot
    _begin(state, knobs, p, now_s)


@inner
def cut_run(state: State, p: int, at_s: float) -> None:
    """A run of several steps ends with the step in which ``at_s`` lies."""
    replica = state.replicas[p]
    if replica.run_count == 1 or at_s >= state.wake_s[p]:
        return
    steps = steps_until(state, p, at_s)
    if steps == replica.run_count:
        # Another replica's step may wait for the end of this run: the device is not free there.
        return
    replica.run_count = steps
    state.wake_s[p] = replica.run_start_s + run_s(replica.run_step_s, replica.run_slope_s, steps)
    state.groups[replica.group].device_free_s = state.wake_s[p]


@inner
def _begin(state: State, knobs: Knobs, p: int, now_s: float) -> None:
    """Plans what may be planned now, and starts the next run of steps."""
    replica = state.replicas[p]
    slot, admitting = replica.slot, True
    while pages_to_grow(state, p, replica.paged_step + 1, replica.step + 1) > num_available(state, p):
        preempt_latest(state, knobs, p, now_s)
        admitting = replica.num_decoding + replica.num_prefilling == 0
    grow_until(state, p, replica.step + 1)
    nothing_planned = state.plans[p, slot].size == 0 and replica.num_decoding == 0
    if not knobs.ahead or nothing_planned or replica.blocked:
        plan_step(state, knobs, p, slot, now_s, admitting)
    if knobs.ahead:
        # While a step is under way nobody is preempted: without pages for the next one nothing is planned. Nor while
        # another base of the group wants the device.
        lacking = pages_to_grow(state, p, replica.paged_step + 1, replica.step + 2) > num_available(state, p)
        replica.blocked = lacking or _wanted_beside(state, p)
        if not replica.blocked:
            grow_until(state, p, replica.step + 2)
            plan_step(state, knobs, p, 1 - slot, now_s, True)
    if replica.num_decoding == 0 and state.plans[p, slot].size == 0:
        state.wake_s[p] = _next_fetched_s(state, knobs, p, now_s)
        return
    _start_run(state, knobs, p, slot, now_s)


@inlined
def _wanted_beside(state: State, p: int) -> bool:
    """Another replica of the group has steps under way, or waits for its turn."""
    replica = state.replicas[p]
    for other in range(replica.first_of_group, replica.end_of_group):
        if other != p and state.replicas[other].running:
            return True
    return False


@inlined
def _start_run(state: State, knobs: Knobs, p: int, slot: int, now_s: float) -> None:
    replica, plan = state.replicas[p], state.plans[p, slot]
    alone = True
    for other in range(replica.first_of_group, replica.end_of_group):
        if other != p and state.replicas[other].running:
            alone = False
            cut_run(state, other, now_s)
    count = 1
    if alone and plan.size == 0 and (not knobs.ahead or state.plans[p, 1 - slot].size == 0):
        count = state.slots[p, 0].end_step - replica.step
        count = 1 + steps_with_pages(state, p, replica.step + 2, count - 1)
    first_s = _step_s(state, p, slot, 0)
    slope_s = 0.0
    if count > 1 and replica.num_stages == 1:
        slope_s = state.coefficients[replica.cost, 0, _KV] * replica.num_decoding
    elif count > 1:
        last_s = _step_s(state, p, slot, count - 1)
        # Of a pipeline, either the pace or the way through sets the time: a run ends where that changes.
        while count > 2 and not _is_straight(state, p, slot, first_s, last_s, count):
            count = (count + 1) // 2
            last_s = _step_s(state, p, slot, count - 1)
        slope_s = (last_s - first_s) / (count - 1)
    start_s = max(now_s, state.groups[replica.group].device_free_s, plan.ready_s)
    replica.running = True
    replica.run_count = count
    replica.run_start_s = start_s
    replica.run_step_s = first_s
    replica.run_slope_s = slope_s
    state.wake_s[p] = start_s + run_s(first_s, slope_s, count)
    state.groups[replica.group].device_free_s = state.wake_s[p]
    if knobs.fetches and count > 1:
        cut_run(state, p, _next_fetched_s(state, knobs, p, now_s))


@inner
def _is_straight(state: State, p: int, slot: int, first_s: float, last_s: float, count: int) -> bool:
    """Whether the seconds of the steps of a run grow evenly: its middle lies between its ends."""
    middle = (count - 1) // 2
    expected_s = first_s + (last_s - first_s) * middle / (count - 1)
    return abs(_step_s(state, p, slot, middle) - expected_s) <= 1e-9 * expected_s


@inner
def _step_s(state: State, p: int, slot: int, later: int) -> float:
    """Seconds of the step that is ``later`` steps after the next one, with the chunks of plan ``slot``."""
    replica, plan = state.replicas[p], state.plans[p, slot]
    step = replica.step + 1 + later
    num_adapters, adapter_bytes = float(replica.decode_adapters), replica.decode_bytes
    for index in range(plan.size):
        adapter = state.requests[state.chunks[p, slot, index].request].adapter
        if adapter != NONE:
            pair = state.pairs[adapter, p]
            if pair.decoding == 0 and pair.marked != step:
                pair.marked = step
                num_adapters += 1.0
                adapter_bytes += state.adapters[replica.cost, adapter].whole_bytes
    decode_rows = float(replica.num_decoding)
    return step_time_s(
        state.coefficients[replica.cost, 0],
        state.coefficients[replica.cost, 1],
        replica.num_stages,
        plan.rows,
        plan.tokens,
        plan.pairs,
        decode_rows + plan.single_rows,
        replica.decode_offset + decode_rows * step + plan.kv_tokens,
        num_adapters,
        adapter_bytes,
        replica.decode_lora + plan.lora_tokens,
    )


@inner
def _next_fetched_s(state: State, knobs: Knobs, p: int, now_s: float) -> float:
    """When the first adapter that is on its way to host memory gets there; infinite: none is awaited."""
    soonest_s = np.inf
    if knobs.fetches:
        for index in range(state.replicas[p].num_waiting):
            since_s = state.requests[state.slots[p, index].waiting].since_s
            if since_s > now_s:
                soonest_s = min(soonest_s, since_s)
    return soonest_s
