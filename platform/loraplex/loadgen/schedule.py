"""What is sent when: fixed before the first request goes out, so that a slow server cannot slow its own load down.

Pure. Called by the CLI; run by ``open_loop``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from loraplex.loadgen.config import ReplayConfig
from loraplex.loadgen.targets import Assignment, Target
from loraplex.traces.arrivals import TraceRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRequest:
    index: int
    at_s: float
    """Seconds since the start of the run."""
    target: Target
    prompt_tokens: int
    output_tokens: int


def plan_replay(
    requests: Sequence[TraceRequest], assignments: Sequence[Assignment], config: ReplayConfig
) -> tuple[PlannedRequest, ...]:
    """The requests of the trace that fall into the run, by time. ``assignments`` covers every (tenant, adapter)."""
    targets = {(entry.trace_tenant, entry.trace_adapter): entry.target for entry in assignments}
    planned = []
    for index, request in enumerate(requests[: config.max_requests]):
        at_s = request.arrival_s / config.speed
        if config.duration_s is not None and at_s >= config.duration_s:
            break
        planned.append(
            PlannedRequest(
                index=index,
                at_s=at_s,
                target=targets[request.tenant, request.adapter],
                prompt_tokens=_tokens(request.prompt_tokens, config.default_prompt_tokens, config.max_prompt_tokens),
                output_tokens=_tokens(request.output_tokens, config.default_output_tokens, config.max_output_tokens),
            )
        )
    return tuple(planned)


def _tokens(said: int | None, default: int, limit: int | None) -> int:
    tokens = max(1, default if said is None else said)
    return tokens if limit is None else min(tokens, limit)
