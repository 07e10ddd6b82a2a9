"""What the engine tells of itself: to routers its load, to traces how far a request is. Pure; called by ``engine``."""

from dataclasses import dataclass

from loraplex.core.step import ArenaSpec
from loraplex.core.wire import LoadReport
from loraplex.engine.memory import Memory
from loraplex.engine.scheduler import Scheduler
from loraplex.engine.sequence import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Of one request, in tokens."""

    num_scheduled: int
    """Planned, those found in the prefix cache among them; 0 before it is admitted."""
    num_computed: int
    """Of steps that have ended, likewise."""
    num_cached: int


def progress_of(sequence: Sequence) -> Progress:
    return Progress(
        num_scheduled=sequence.num_scheduled,
        num_computed=sequence.num_computed,
        num_cached=sequence.num_cached or 0,
    )


def load_report(
    scheduler: Scheduler, memory: Memory, arena: ArenaSpec, *, num_generated: int, num_free_places: int
) -> LoadReport:
    """``credits``: ``num_free_places``, for all gateways together."""
    queued = sum(s.num_uncomputed for s in scheduler.running if s.num_uncomputed > 1)
    return LoadReport(
        num_running=len(scheduler.running),
        num_waiting=len(scheduler.waiting),
        num_pages=arena.num_pages,
        num_free_pages=memory.num_available,
        num_queued_tokens=queued + scheduler.waiting.num_tokens,
        credits=max(0, num_free_places),
        steps=memory.last_done_step,
        generated_tokens=num_generated,
        adapter_loads=memory.adapters.num_loads,
        adapter_prefetches=memory.adapters.num_prefetches,
        adapter_hits=memory.num_adapter_hits,
        cached_tokens=memory.num_cached_tokens,
        preemptions=scheduler.num_preemptions,
    )
