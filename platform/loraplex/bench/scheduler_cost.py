"""What a step costs the engine alone: CPU time of schedule, plan and complete, with no executor behind them.

All requests decode, one token a step, over a number of adapters; a made-up token answers each row. One step is kept in
flight while the next is planned, as on an accelerator. Run by hand: ``python -m loraplex.bench.scheduler_cost``.
"""

import argparse
import json
import statistics
import time

import msgspec

from loraplex.core.adapter import AdapterRef
from loraplex.core.ids import BaseModelId, Digest, RequestId, TenantName
from loraplex.core.request import EngineRequest, SamplingParams
from loraplex.core.step import ArenaSpec, SampledToken, StepPlan, StepResult
from loraplex.engine import Engine, EngineConfig
from loraplex.testing.fake_executor import fake_model

_PAGE_SIZE = 16


class SchedulerCost(msgspec.Struct, frozen=True, kw_only=True):
    """Medians over steps, in microseconds of CPU time."""

    rows: int
    steps: int
    schedule_us: float
    complete_us: float
    step_us: float


def measure(*, rows: int, adapters: int, steps: int, prompt_tokens: int = 512) -> SchedulerCost:
    """``rows`` requests of ``adapters`` adapters in turn (0: all of the base) through ``steps`` decode steps."""
    config = EngineConfig(max_running=rows, max_step_tokens=max(2048, 2 * rows))
    # The first decode while the last are prefilled.
    total = prompt_tokens + steps + 16 + 2 * rows * prompt_tokens // config.max_step_tokens
    engine = Engine(
        config,
        model=fake_model(vocab_size=1 << 15, max_context_tokens=total),
        arena=ArenaSpec(num_pages=2 * rows * (total // _PAGE_SIZE + 1), page_size=_PAGE_SIZE, page_bytes=1 << 21),
    )
    digests = [Digest(f"{index:064d}") for index in range(adapters)]
    for digest in digests:
        engine.adapter_staged(digest, 4, 0.0)
    for index in range(rows):
        engine.add(_request(index, digests, prompt_tokens, total), 0.0)
    schedule_ns: list[int] = []
    complete_ns: list[int] = []
    plan = _plan(engine)
    while len(schedule_ns) < steps:
        started = time.thread_time_ns()
        following = engine.schedule(0.0).plan
        scheduled = time.thread_time_ns()
        result = _answer(plan)
        completing = time.thread_time_ns()
        engine.complete(result, 0.0)
        completed = time.thread_time_ns()
        assert following is not None, "the engine stalled"
        if len(plan.rows) == rows and plan.num_tokens == rows == following.num_tokens:
            schedule_ns.append(scheduled - started)
            complete_ns.append(completed - completing)
        plan = following
    both = [a + b for a, b in zip(schedule_ns, complete_ns, strict=True)]
    return SchedulerCost(
        rows=rows,
        steps=steps,
        schedule_us=round(statistics.median(schedule_ns) / 1e3, 1),
        complete_us=round(statistics.median(complete_ns) / 1e3, 1),
        step_us=round(statistics.median(both) / 1e3, 1),
    )


def _plan(engine: Engine) -> StepPlan:
    plan = engine.schedule(0.0).plan
    assert plan is not None, "nothing could be planned"
    return plan


def _answer(plan: StepPlan) -> StepResult:
    tokens = tuple(SampledToken(slot=row.slot, token_id=100) for row in plan.rows if row.samples)
    return StepResult(step_id=plan.step_id, tokens=tokens, duration_s=0.0)


def _request(index: int, digests: list[Digest], prompt_tokens: int, total: int) -> EngineRequest:
    tenant = TenantName(f"tenant{index % 8}")
    adapter = None
    if digests:
        adapter = AdapterRef(tenant=tenant, name="a", version=1, digest=digests[index % len(digests)])
    return EngineRequest(
        request_id=RequestId(f"r{index}"),
        tenant=tenant,
        base_model_id=BaseModelId("fake-base"),
        adapter=adapter,
        prompt_token_ids=tuple((index + position) % 1000 for position in range(prompt_tokens)),
        sampling=SamplingParams(max_tokens=total, seed=0),
        arrival_s=float(index),
        cache_salt=f"salt{index}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="CPU time that the engine takes for a decode step.")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--adapters", type=int, default=32)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    for rows in options.rows:
        cost = measure(rows=rows, adapters=options.adapters, steps=options.steps)
        if options.json:
            print(json.dumps(msgspec.to_builtins(cost)))
        else:
            parts = f"schedule {cost.schedule_us}, complete {cost.complete_us}"
            print(f"{rows:4} rows: {cost.step_us:8.1f} us a step ({parts})")


if __name__ == "__main__":
    main()
