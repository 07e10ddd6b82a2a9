"""All that a report of a plan shows, as values. Made by ``collect``; read by ``page``, and by programs as JSON."""

from dataclasses import dataclass

from loraplex.core.plan import Plan
from loraplex.planner.problem import Node
from loraplex.planner.search import Found
from loraplex.simulator.types import GroupUse, Score


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyScore:
    policy: str
    setting: str
    """The best of those tried."""
    planned: float
    """Attainment on the trace that it was tuned on (its sample)."""
    score: Score
    """On the trace that is scored, as all below."""
    is_alpaserve: bool
    by_slo: tuple[float, ...]
    """Attainment of the same plan with all targets times ``PlanReport.slo_scales``."""
    by_rate: tuple[float, ...]
    """Attainment of the same plan with requests coming ``PlanReport.rate_factors`` times as fast, on a sample of the
    trace."""
    timeline: tuple[float, ...]
    """Attainment in each part of the time; NaN where nothing arrived."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterUse:
    tenant: str | None
    base_model: str | None
    name: str
    requests: int
    attainment: float
    """NaN without requests."""
    groups: tuple[str, ...]
    """That list it; none: any group of its base takes it."""
    served_by: dict[str, int]
    """Requests by group, of those that served it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanReport:
    """G groups of the plan, T equal parts of the time that is scored."""

    plan: Plan
    found: Found
    nodes: tuple[Node, ...]
    score: Score
    """Of the plan on the trace that is scored: the planning trace, or another window."""
    groups: tuple[GroupUse, ...]
    """[G]"""
    end_s: float
    """When the last request ended."""
    tenants: dict[str, float]
    """Attainment, worst first."""
    adapters: tuple[AdapterUse, ...]
    """Busiest first."""
    policies: tuple[PolicyScore, ...]
    """The plan itself first, then the baselines."""
    gpus_bound: float
    """Fewest GPUs that could serve 99 % of the planning trace, by the linear programme."""
    slo_scales: tuple[float, ...]
    rate_factors: tuple[float, ...]
    timeline_s: tuple[float, ...]
    """[T] starts of the parts."""
    requests_per_s: tuple[float, ...]
    """[T]"""
    in_flight: tuple[tuple[float, ...], ...]
    """[G][T] requests that a group had, waiting and running, on average."""
