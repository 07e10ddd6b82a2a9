"""The arrivals of one adapter, drawn as they are needed: the same numbers however the time is cut into slabs."""

import math

import numpy as np
import numpy.typing as npt

from loraplex.traces.synth.modulation import OnOffSwitch, Slab
from loraplex.traces.synth.recipe import Process, Recipe

_MIN_DRAW = 16
_MAX_DRAW = 1 << 16
_ON_OFF_STREAM = 1
_Floats = npt.NDArray[np.float64]


class ArrivalProcess:
    """A renewal process at a constant rate. Gaps come from numpy's legacy ``RandomState(seed)``, one after the other.

    So ``gamma`` with AlpaServe's rate and seed gives AlpaServe's arrivals, bit for bit.
    """

    def __init__(self, process: Process, *, rate: float, cv: float, seed: int) -> None:
        self._random = np.random.RandomState(seed)
        self._process = process
        self._rate = rate
        cv = 1.0 if process is Process.POISSON else cv
        self._shape, self._scale = 1 / cv**2, cv**2 / rate
        self._last = 0.0
        self._drawn: _Floats = np.empty(0)
        if process is Process.UNIFORM:
            self._last = self._random.random_sample() / rate - 1 / rate

    def before(self, end: float) -> _Floats:
        """The arrivals before ``end`` that no call gave before. [N] float64, rising."""
        if len(self._drawn) and self._drawn[0] >= end:
            return self._drawn[:0]
        parts = []
        while self._last < end:
            parts.append(self._drawn)
            missing = math.ceil((end - self._last) * self._rate)
            self._drawn = self._draw(min(max(missing, _MIN_DRAW), _MAX_DRAW))
        count = int(np.searchsorted(self._drawn, end, side="left"))
        parts.append(self._drawn[:count])
        self._drawn = self._drawn[count:]
        return np.concatenate(parts)

    def _draw(self, count: int) -> _Floats:
        if self._process is Process.UNIFORM:
            gaps = np.full(count, 1 / self._rate)
        else:
            gaps = self._random.gamma(self._shape, self._scale, size=count)
        gaps[0] += self._last
        drawn: _Floats = np.cumsum(gaps)
        self._last = float(drawn[-1])
        return drawn


class AdapterArrivals:
    """Arrivals of one adapter with its rate changing over time."""

    def __init__(self, recipe: Recipe, adapter: int, rate: float, *, constant: bool) -> None:
        """``constant``: no slab changes the rate, so that arrivals need no mapping and keep their last bits."""
        seed = recipe.seed + adapter
        self._process = ArrivalProcess(recipe.process, rate=rate, cv=recipe.cv, seed=seed)
        self._adapter = adapter
        self._constant = constant
        self._switch: OnOffSwitch | None = None
        if recipe.on_off is not None:
            rng = np.random.default_rng([seed, _ON_OFF_STREAM])
            self._switch = OnOffSwitch(recipe.on_off.mean_on_s, recipe.on_off.mean_off_s, rng)
        self._operational = 0.0
        """Operational time at the end of the last slab."""

    def within(self, slab: Slab) -> _Floats:
        """Arrivals in ``slab``; slabs follow each other. [N] float64, rising."""
        edges = slab.edges
        if self._switch is None and self._constant:
            return self._process.before(float(edges[-1]))
        factors = slab.factors(self._adapter)
        if self._switch is not None:
            edges, factors = self._switch.apply(edges, factors)
        passed = np.cumsum(np.concatenate([[self._operational], factors * np.diff(edges)]))
        self._operational = float(passed[-1])
        drawn = self._process.before(self._operational)
        if not len(drawn):
            return drawn
        # Where the factor is 0 operational time stands still; the last edge with that time is where it goes on.
        segment = np.searchsorted(passed, drawn, side="right") - 1
        arrivals: _Floats = np.minimum(
            edges[segment] + (drawn - passed[segment]) / factors[segment], edges[segment + 1]
        )
        return arrivals
