"""One run of the planner on recorded traffic, in a process of its own: ``python -m loraplex.controller.fleet.replan``.

Takes a ``Task`` on its standard input and writes an ``Answer``, both msgpack. The search takes seconds to minutes of a
CPU and imports a compiler; the controller's event loop has neither to spare.
"""

import asyncio
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from loraplex.controller.fleet.config import PlanningConfig
from loraplex.core.errors import LoraplexError, NotFound, Unavailable
from loraplex.core.fleet import NodeStatus
from loraplex.core.plan import Plan, Shape
from loraplex.traces.arrivals import Arrivals

if TYPE_CHECKING:
    from loraplex.planner.problem import Problem

N = TypeVar("N")
_ENOUGH = 20
"""Requests of an adapter or a base that tell how long its outputs are."""
_GRACE_S = 900.0
"""For imports, the compiler's first run and the confirmation, beyond the search itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    trace_url: str
    since_s: float
    """Unix time from which on traffic counts."""
    unwritten: bytes = b""
    """Requests since then that the trace files do not hold yet, most of them not ended: an Arrow IPC stream."""
    nodes: tuple[NodeStatus, ...]
    current: Plan
    config: PlanningConfig
    bases: tuple[str, ...]
    """Others in the traffic are not planned for."""
    lora_ranks: Mapping[str, int]
    """Of ``tenant/name``."""
    not_these: tuple[tuple[str, Shape, tuple[str, ...]], ...] = ()
    """Kinds of group (GPU, shape, bases) that could not be started."""
    instead: Plan | None = None
    """Nothing is searched for: what this plan wins over ``current``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    plan: Plan | None
    """None: the current one stays."""
    reason: str
    attainment: float | None = None
    """Simulated, of ``plan`` (of ``Task.instead``); None: nothing was simulated."""
    attainment_now: float | None = None
    """Simulated, of the current plan."""

    @property
    def gain(self) -> float | None:
        if self.attainment is None or self.attainment_now is None:
            return None
        return self.attainment - self.attainment_now


async def replan(task: Task) -> Answer:
    """Raises Unavailable when the process fails or takes too long. It ends with the call, also with one cancelled."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "loraplex.controller.fleet.replan",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(task.config.max_search_s + _GRACE_S):
            answer, complaint = await process.communicate(msgspec.msgpack.encode(task))
    except TimeoutError:
        raise Unavailable("the planner took too long") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        said = complaint.decode("utf-8", "replace").strip().splitlines()
        raise Unavailable(f"the planner failed: {said[-1] if said else f'exit code {process.returncode}'}")
    return msgspec.msgpack.decode(answer, type=Answer)


def plan_for(task: Task) -> Answer:
    """In this process. Imports the planner, and with it a compiler, which the controller does without."""
    from loraplex.planner.problem import Kind
    from loraplex.planner.search import Search

    try:
        arrivals = recent_arrivals(task)
    except NotFound:
        return Answer(plan=None, reason="no traffic was recorded")
    if task.instead is None and len(arrivals) < task.config.min_requests:
        return Answer(plan=None, reason=f"{len(arrivals)} requests in the window are too few to plan from")
    problem = problem_for(task, arrivals)
    if task.instead is not None:
        was, wins = (simulated(plan, problem)[1] for plan in (task.current, task.instead))
        return Answer(plan=None, reason="simulated", attainment=wins, attainment_now=was)
    try:
        current, now = simulated(task.current, problem)
        current_reason = ""
    except LoraplexError as error:
        current, now = None, None
        current_reason = f"; the plan in force cannot be simulated: {error.message}"
    Search(problem).warm_up()
    started_s = time.perf_counter()

    def allowed(kind: Kind) -> bool:
        return (kind.gpu, kind.shape, tuple(sorted(kind.bases))) not in task.not_these

    def used() -> float:
        return (time.perf_counter() - started_s) / task.config.max_search_s

    found = Search(
        problem,
        evaluations=task.config.max_evaluations,
        current=current,
        out_of_time=lambda: used() > 1,
        time_used=used,
        only_kinds=allowed,
    ).run()
    answer = Answer(
        plan=found.plan,
        reason="; ".join(found.reasons) + current_reason,
        attainment=found.attainment,
        attainment_now=now,
    )
    if found.kept or (answer.gain is not None and answer.gain < task.config.min_gain):
        return replace(answer, plan=None, reason="no other plan is better by more than its move costs")
    if current is not None and by_chance(current, found.plan, problem):
        return replace(answer, plan=None, reason="another plan is better, by no more than chance explains")
    return answer


def problem_for(task: Task, arrivals: Arrivals) -> "Problem":
    """What is planned for: these requests on the nodes of the task. LoraplexError when they are not for each other."""
    from loraplex.planner.fleet import AdapterRanks, Fleet, NodeConfig
    from loraplex.planner.problem import Problem
    from loraplex.simulator.types import Slo

    nodes = tuple(NodeConfig(name=node.name, gpu=node.gpu, gpus=node.num_gpus) for node in task.nodes if node.num_gpus)
    fleet = Fleet(
        profiles=task.config.profiles,
        nodes=nodes,
        bases=task.config.profile_bases,
        adapters=AdapterRanks(lora_rank=16, ranks=dict(task.lora_ranks)),
    )
    named = dict.fromkeys((*arrivals.base_models, *(a.base_model for a in arrivals.adapters if a.base_model)))
    return Problem(
        nodes=fleet.all_nodes(),
        arrivals=arrivals,
        adapters=fleet.sizes(arrivals.adapters),
        costs=fleet.costs(named),
        slo=Slo(ttft_s=task.config.ttft_s, tpot_s=task.config.tpot_s),
        tenant_floor=task.config.tenant_floor,
        turn_s=task.config.turn_s,
    )


def by_chance(current: Plan, plan: Plan, problem: "Problem") -> bool:
    """Whether the recorded requests cannot tell the two apart: the search has chosen among many plans."""
    from loraplex.planner.chance import paired_interval
    from loraplex.simulator import fast
    from loraplex.simulator.workload import Workload

    workload = Workload.of(problem.arrivals, problem.adapters)
    good, good_now = (fast.simulate(problem.simulation(one), workload).good for one in (plan, current))
    return paired_interval(good, good_now)[0] <= 0


def simulated(plan: Plan, problem: "Problem") -> tuple[Plan, float]:
    """The plan, its GPU types filled in, and its simulated attainment. LoraplexError when it cannot be simulated."""
    from loraplex.simulator import fast
    from loraplex.simulator.workload import Workload

    plan = _typed(plan, problem.nodes[0].gpu)
    workload = Workload.of(problem.arrivals, problem.adapters)
    return plan, fast.simulate(problem.simulation(plan), workload).score.attainment


def recent_arrivals(task: Task) -> Arrivals:
    """The requests for our bases that were let in since ``since_s``, whatever became of them, with token counts for
    all: one that has not ended, was refused, or was given up before its first token, has an output like another of
    its adapter or base. NotFound when there are none."""
    from loraplex.planner.sample import taken
    from loraplex.traces.arrivals import read_arrivals
    from loraplex.traces.schema import decode_table

    unwritten = decode_table(task.unwritten) if task.unwritten else None
    read = read_arrivals(task.trace_url, sort=True, modified_after_s=task.since_s, unwritten=unwritten)
    read = replace(read, output_tokens=with_likely_outputs(read))
    known = np.array([base in task.bases for base in read.base_models] + [False])
    of_adapter = np.array([a.base_model in task.bases for a in read.adapters] + [False])
    recent = read.origin_s + read.arrival_s >= task.since_s
    ours = np.where(read.adapter >= 0, of_adapter[read.adapter], known[read.base_model])
    rows = np.flatnonzero(recent & ours & (read.prompt_tokens > 0))
    if not len(rows):
        raise NotFound("no requests were recorded")
    chosen = taken(read, rows, read.arrival_s[rows] - read.arrival_s[rows[0]])
    adapter, adapters = _used(chosen.adapter, chosen.adapters)
    base_model, base_models = _used(chosen.base_model, chosen.base_models)
    return replace(
        chosen,
        adapter=adapter,
        adapters=adapters,
        base_model=base_model,
        base_models=base_models,
    )


def with_likely_outputs(arrivals: Arrivals) -> npt.NDArray[np.int32]:
    """Output tokens of all requests: where none are known those of another, drawn from the same adapter, from the same
    base when the adapter has few, or from all; 1 when nobody has any. Always the same for the same requests. [R] int32.

    Requests in ``arrivals`` that came before a window are as good as those in it: of a window of arrivals alone, mostly
    the short ones have ended.
    """
    output = arrivals.output_tokens.copy()
    known = output > 0
    numbers = np.random.default_rng(0)
    pairs = np.stack([arrivals.base_model, arrivals.adapter], axis=1)
    for base, adapter in np.unique(pairs[~known], axis=0):
        of_base = arrivals.base_model == base
        alike = of_base & (arrivals.adapter == adapter)
        pools = (alike & known, of_base & known, known)
        pool = next((one for one in pools if np.count_nonzero(one) >= _ENOUGH), known)
        asked = alike & ~known
        output[asked] = numbers.choice(output[pool], np.count_nonzero(asked)) if pool.any() else 1
    return output


def _used(index: npt.NDArray[np.int32], names: tuple[N, ...]) -> tuple[npt.NDArray[np.int32], tuple[N, ...]]:
    """``index`` into the names that it uses, and these; -1 stays."""
    used = np.unique(index[index >= 0])
    place = np.full(len(names) + 1, -1, dtype=np.int32)
    place[used] = np.arange(len(used), dtype=np.int32)
    return place[index], tuple(names[one] for one in used)


def _typed(plan: Plan, gpu: str) -> Plan:
    """Costs are by GPU type; a plan may leave it open where there is one."""
    return replace(plan, groups=tuple(replace(group, gpu=group.gpu or gpu) for group in plan.groups))


def main() -> None:
    task = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=Task)
    try:
        answer = plan_for(task)
    except LoraplexError as error:
        answer = Answer(plan=None, reason=f"no plan can be made: {error.message}")
    if answer.attainment is not None and math.isnan(answer.attainment):
        answer = replace(answer, attainment=None)
    sys.stdout.buffer.write(msgspec.msgpack.encode(answer))


if __name__ == "__main__":
    main()
