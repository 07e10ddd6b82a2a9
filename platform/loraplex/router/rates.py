"""What steps cost on each kind of replica: from cost profiles where they know it, otherwise from what replicas report.

Replicas of one base on one GPU type in one shape are alike and share what is measured. Called by ``router``.
"""

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from loraplex.core.control import ReplicaRoute
from loraplex.core.errors import BadConfig
from loraplex.core.ids import BaseModelId
from loraplex.core.plan import Shape
from loraplex.core.wire import LoadReport, ReplicaInfo
from loraplex.cost.loads import LoadRates, Tier
from loraplex.cost.profile import CostProfile
from loraplex.router.config import RouterConfig
from loraplex.router.prediction import Rates

FloatArray = npt.NDArray[np.float64]

_UNKNOWN = Rates(step_s=0.02, row_s=2e-4, token_s=5e-5)
"""Until a replica has told something; only the proportions matter."""
_FORGET = 0.999
_SOLVE_EVERY = 16
"""Reports; the first ones at powers of two."""
_LORA_RANK = 16
"""Of the adapter whose load a profile is asked for: the router does not know their sizes."""

_Kind = tuple[str, BaseModelId, Shape]


class RateBook:
    def __init__(self, config: RouterConfig) -> None:
        """BadConfig for a profile that cannot be read."""
        self._config = config
        self._profile = CostProfile.joined(CostProfile.load(name) for name in config.profiles)
        self._measured: dict[_Kind, MeasuredRates] = {}

    def rates(self, route: ReplicaRoute, info: ReplicaInfo | None) -> Rates:
        """``info``: what the replica has told of itself."""
        max_running = (info and info.max_running) or _UNKNOWN.max_running
        max_step_tokens = (info and info.max_step_tokens) or _UNKNOWN.max_step_tokens
        try:
            cost = self._profile.step_cost(route.base_model_id, route.gpu, route.shape)
        except BadConfig:
            return replace(self._of(route).rates, max_running=max_running, max_step_tokens=max_step_tokens)
        return Rates.of(cost, route.shape, max_step_tokens=max_step_tokens, max_running=max_running)

    def observe(self, route: ReplicaRoute, before: LoadReport, after: LoadReport) -> bool:
        """Two reports of one replica, one after the other. True: its measured rates have changed."""
        return self._of(route).observe(before, after)

    def load_s(self, route: ReplicaRoute) -> tuple[float, float]:
        """Seconds of an adapter (from host memory to the accelerator, into host memory)."""
        try:
            loads: LoadRates = self._profile.gpu(route.gpu).loads
            num_bytes = self._profile.adapter_bytes(route.base_model_id, _LORA_RANK)
        except BadConfig:
            return self._config.adapter_load_s, self._config.adapter_fetch_s
        load_s = loads.seconds(num_bytes, num_gpus=route.shape.num_ranks)
        return load_s, loads.seconds(num_bytes, Tier.DISK, num_gpus=route.shape.num_ranks) - load_s

    def _of(self, route: ReplicaRoute) -> "MeasuredRates":
        return self._measured.setdefault((route.gpu, route.base_model_id, route.shape), MeasuredRates())


class MeasuredRates:
    """Least squares over what replicas report, older reports counting less: seconds = steps, decoding rows, prompt
    tokens, each times a rate that is not negative."""

    def __init__(self) -> None:
        self.rates = _UNKNOWN
        self._products = np.zeros((3, 3), dtype=np.float64)
        self._targets = np.zeros(3, dtype=np.float64)
        self._num_observed = 0

    def observe(self, before: LoadReport, after: LoadReport) -> bool:
        """True: ``rates`` has changed. Reports that tell no times are ignored."""
        steps, busy_s = after.steps - before.steps, after.busy_s - before.busy_s
        if steps <= 0 or busy_s <= 0:
            return False
        rows = max(0, after.generated_tokens - before.generated_tokens)
        tokens = max(0, after.prefilled_tokens - before.prefilled_tokens)
        found = np.array([steps, rows, tokens], dtype=np.float64)
        self._products = _FORGET * self._products + np.outer(found, found)
        self._targets = _FORGET * self._targets + found * busy_s
        self._num_observed += 1
        if self._num_observed % min(_SOLVE_EVERY, 1 << self._num_observed.bit_length() - 1):
            return False
        step_s, row_s, token_s = self._solve()
        self.rates = Rates(step_s=step_s, row_s=row_s, token_s=token_s)
        return True

    def _solve(self) -> list[float]:
        """The active set shrinks until no rate is negative. What was never seen to vary costs nothing."""
        scale = np.sqrt(np.maximum(np.diag(self._products), 1e-12))
        products, targets = self._products / np.outer(scale, scale), self._targets / scale
        active = np.diag(self._products) > 0
        solved = np.zeros(3)
        while active.any():
            # A little of the identity: rows that always come in the same number cannot be told from steps.
            ridge = products[np.ix_(active, active)] + 1e-6 * np.eye(int(active.sum()))
            solved[:] = 0.0
            solved[active] = np.linalg.solve(ridge, targets[active])
            if (solved >= 0).all():
                break
            active &= solved > 0
        return [float(value) for value in solved / scale]
