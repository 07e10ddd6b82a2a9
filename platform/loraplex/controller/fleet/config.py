"""Settings of the fleet: how plans are carried out, and who may make them."""

from typing import Literal

import msgspec

Mode = Literal["auto", "propose", "off"]


class PlanningConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the planner is asked, and how often."""

    profiles: tuple[str, ...] = ()
    """Shipped names, or files of ``loraplex profile``. Empty: layouts are not planned."""
    profile_bases: dict[str, str] = {}
    """Base of ours -> base in the profiles, where they differ."""
    interval_s: float = 300.0
    """Between two runs of the planner."""
    window_s: float = 1800.0
    """Of recorded traffic: what is planned from, and what attainment is measured over."""
    min_requests: int = 200
    """Fewer in the window tell nothing: the plan stays."""
    ttft_s: float = 0.5
    """Target that a request must meet, from arrival to the first token."""
    tpot_s: float = 0.05
    """And between tokens, on average."""
    max_evaluations: int = 400
    """Plans that one run scores, at most."""
    max_search_s: float = 60.0
    """A run ends after so long with the best that it has."""
    min_gain: float = 0.005
    """Attainment that a new plan must win, its move paid; and more than chance explains over the window's requests."""
    tenant_floor: float = 0.0
    """Attainment that no tenant should fall under."""
    turn_s: float = 8e-4
    """What bases that share a group lose whenever another one's turn begins: ``python -m loraplex.model_runner.turns``
    measures it."""
    reassign_interval_s: float = 5.0
    """Between two looks at the rates of adapters; 0: adapters stay where the plan puts them."""
    rate_window_s: float = 30.0
    """Over which these rates are measured."""

    def __post_init__(self) -> None:
        positive = ("interval_s", "window_s", "ttft_s", "tpot_s", "max_search_s", "rate_window_s")
        if min(getattr(self, name) for name in positive) <= 0 or self.max_evaluations < 1 or self.min_requests < 1:
            raise ValueError(f"{', '.join(positive)}, max_evaluations and min_requests must be positive")
        if self.turn_s < 0:
            raise ValueError("turn_s must not be negative")


class FleetConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How plans come about and are carried out."""

    mode: Mode = "off"
    """``auto``: plans of the planner are applied, and adapters move with their rates. ``propose``: plans wait for
    ``loraplex plan apply --version``. ``off``: only administrators change anything."""
    planning: PlanningConfig = PlanningConfig()
    autoscale: bool = False
    """Groups that find no room are asked for all the same, so that Ray's autoscaler brings nodes for them."""
    tick_s: float = 1.0
    """Between two looks at what changed, when nothing tells."""
    drain_quiet_s: float = 1.0
    """A draining replica must have had no request for so long: gateways learn of routes within this time."""
    drain_timeout_s: float = 120.0
    """Then it is stopped; gateways send what still runs there on to others."""
    max_attempts: int = 3
    """Failed starts of a kind of group until a new plan is given up for the one before it."""
    retry_first_s: float = 0.5
    """Until the next start after a failed one; doubles up to ``retry_max_s``."""
    retry_max_s: float = 10.0
    """Longest pause between starts."""
    stable_s: float = 60.0
    """A replica that ran for so long and dies is no failed start: its successor starts at once."""
    crowded_s: float = 120.0
    """A start that takes longer is taken to wait for room; then an old group makes some."""
    node_hold_s: float = 10.0
    """A node that came back must stay for so long before it is used, and twice as long after each further time."""
    node_max_hold_s: float = 300.0
    """Longest of these times."""
    idle_s: float = 300.0
    """A base that has no group in the plan and was woken goes again after so long without a request."""

    def __post_init__(self) -> None:
        positive = ("tick_s", "drain_timeout_s", "retry_first_s", "retry_max_s", "crowded_s", "idle_s")
        if min(getattr(self, name) for name in positive) <= 0 or self.max_attempts < 1:
            raise ValueError(f"{', '.join(positive)} and max_attempts must be positive")
