"""Steps of the fast simulator: what ends, what is planned, how long the next run of steps takes.

While nothing but decoding goes on, all steps until the first request ends are one run: their times are an arithmetic
series, since only the context grows. What comes in between cuts the run at the end of a step. Steps of pipelines, which
overlap, are ``fast_pipeline``'s. Compiled; called by ``fast_router`` and ``fast``.
"""

import numpy as np

from loraplex.cost.step_cost import StepCoefficients
from loraplex.simulator.compiled import inlined, inner
from loraplex.simulator.fast_device import hand_over, is_wanted, take_turn
from loraplex.simulator.fast_memory import grow_until, num_available, pages_to_grow, steps_with_pages
from loraplex.simulator.fast_pipeline import arrived_in_pipeline, pipeline_step_done
from loraplex.simulator.fast_runs import run_s, steps_until
from loraplex.simulator.fast_scheduler import chunk_done, finish_due, next_fetched_s, plan_step, preempt_latest, report
from loraplex.simulator.fast_state import NONE, Knobs, State
from loraplex.simulator.step_time import seconds_of

_KV = StepCoefficients.__struct_fields__.index("kv_token_s")


@inlined
def arrived(state: State, knobs: Knobs, p: int, now_s: float, ready_s: float) -> None:
    """A request that can be admitted from ``ready_s`` on came to a replica."""
    replica = state.replicas[p]
    if replica.num_stages > 1:
        arrived_in_pipeline(state, knobs, p, now_s, ready_s)
    elif replica.running:
        _cut_run(state, p, ready_s)
    elif ready_s <= now_s:
        _begin(state, knobs, p, now_s, False)
    else:
        state.wake_s[p] = min(state.wake_s[p], ready_s)


@inner
def wake(state: State, knobs: Knobs, p: int) -> None:
    """The moment ``wake_s`` of a replica has come."""
    replica = state.replicas[p]
    now_s = state.wake_s[p]
    if replica.num_stages > 1:
        pipeline_step_done(state, knobs, p, now_s)
        return
    if not replica.running:
        _begin(state, knobs, p, now_s, False)
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
    is_ahead = False
    if knobs.ahead:
        replica.slot = 1 - slot
        is_ahead = not replica.blocked and (replica.num_decoding > 0 or state.plans[p, replica.slot].size > 0)
    if not is_ahead:
        following = hand_over(state, p)
        if following != NONE:
            _start_run(state, knobs, following, state.replicas[following].slot, now_s + knobs.turn_s)
    _begin(state, knobs, p, now_s, is_ahead)


@inner
def _cut_run(state: State, p: int, at_s: float) -> None:
    """A run of several steps ends with the step in which ``at_s`` lies, so that what came is in the next plan."""
    replica = state.replicas[p]
    if replica.run_count > 1 and not replica.blocked and at_s < state.wake_s[p]:
        _end_run_after(state, p, steps_until(state, p, at_s))


@inner
def _make_way(state: State, knobs: Knobs, p: int, at_s: float) -> None:
    """Another replica waits from now on: the run ends with what is planned, and the turn with it."""
    replica = state.replicas[p]
    if replica.run_count == 1 or replica.blocked:
        return
    steps = steps_until(state, p, at_s) + knobs.ahead
    if steps <= replica.run_count:
        _end_run_after(state, p, steps)
        replica.blocked = knobs.ahead > 0


@inlined
def _end_run_after(state: State, p: int, steps: int) -> None:
    replica = state.replicas[p]
    replica.run_count = steps
    state.wake_s[p] = replica.run_start_s + run_s(replica.run_step_s, replica.run_slope_s, steps)


@inner
def _begin(state: State, knobs: Knobs, p: int, now_s: float, is_ahead: bool) -> None:
    """Plans what may be planned now, and starts the next run of steps, or waits for the turn. ``is_ahead``: its first
    step was planned before, within the turn that it has."""
    replica = state.replicas[p]
    slot, admitting = replica.slot, True
    while pages_to_grow(state, p, replica.paged_step + 1, replica.step + 1) > num_available(state, p):
        preempt_latest(state, knobs, p, now_s)
        admitting = replica.num_decoding + replica.num_prefilling == 0
    grow_until(state, p, replica.step + 1)
    if not is_ahead:
        plan_step(state, knobs, p, slot, now_s, admitting)
        if replica.num_decoding == 0 and state.plans[p, slot].size == 0:
            state.wake_s[p] = next_fetched_s(state, knobs, p, now_s)
            return
        if not take_turn(state, p):
            replica.running, replica.blocked = True, True
            replica.run_count = 1
            state.wake_s[p] = np.inf
            _make_way(state, knobs, state.groups[replica.group].holder, now_s)
            return
    if knobs.ahead:
        # While a step is under way nobody is preempted: without pages for the next one nothing is planned. Nor when the
        # turn is another's next.
        lacking = pages_to_grow(state, p, replica.paged_step + 1, replica.step + 2) > num_available(state, p)
        replica.blocked = lacking or is_wanted(state, p)
        if not replica.blocked:
            grow_until(state, p, replica.step + 2)
            plan_step(state, knobs, p, 1 - slot, now_s, True)
    else:
        replica.blocked = False
    _start_run(state, knobs, p, slot, now_s)


@inner
def _start_run(state: State, knobs: Knobs, p: int, slot: int, now_s: float) -> None:
    replica, plan = state.replicas[p], state.plans[p, slot]
    count = 1
    is_even = plan.size == 0 and (not knobs.ahead or state.plans[p, 1 - slot].size == 0)
    if is_even and not replica.blocked and not is_wanted(state, p):
        count = state.slots[p, 0].end_step - replica.step
        count = 1 + steps_with_pages(state, p, replica.step + 2, count - 1)
    replica.running = True
    replica.run_count = count
    replica.run_start_s = max(now_s, plan.ready_s)
    replica.run_step_s = _step_s(state, p, slot, 0)
    replica.run_slope_s = state.coefficients[replica.cost, 0, _KV] * replica.num_decoding if count > 1 else 0.0
    _end_run_after(state, p, count)
    if knobs.fetches and count > 1:
        _cut_run(state, p, next_fetched_s(state, knobs, p, now_s))


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
    return seconds_of(
        state.coefficients[replica.cost, 0],
        plan.rows,
        plan.tokens,
        plan.pairs,
        decode_rows + plan.single_rows,
        replica.decode_offset + decode_rows * step + plan.kv_tokens,
        num_adapters,
        adapter_bytes,
        replica.decode_lora + plan.lora_tokens,
    )
