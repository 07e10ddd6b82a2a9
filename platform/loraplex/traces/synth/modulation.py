"""How an adapter's rate changes over time: a factor, piecewise constant, that stretches and presses its arrivals.

Arrivals are drawn in operational time u = integral of the factor, and mapped back to seconds, so that the gaps keep
their distribution relative to the rate of the moment. Walked slab by slab, in order of time.
"""

import math

import numpy as np
import numpy.typing as npt

from loraplex.traces.synth.recipe import Recipe

_DIURNAL_STEPS = 288
"""The cosine is cut into so many steps a period: five minutes of a day."""
_Floats = npt.NDArray[np.float64]


class Modulation:
    """Diurnal, flash crowds and drift: factors that follow from time and adapter. Stateless."""

    def __init__(self, recipe: Recipe, rates: _Floats) -> None:
        self._recipe = recipe
        self._rates = rates

    @property
    def is_constant(self) -> bool:
        recipe = self._recipe
        return recipe.diurnal is None and not recipe.flash_crowds and recipe.drift is None

    @property
    def peak(self) -> float:
        """Upper bound of the total rate relative to ``Recipe.rate``."""
        peak = 1.0 if self._recipe.diurnal is None else 1 + self._recipe.diurnal.amplitude
        for crowd in self._recipe.flash_crowds:
            peak *= max(1.0, crowd.factor)
        return peak

    def edges(self, start_s: float, end_s: float) -> _Floats:
        """Times from ``start_s`` to ``end_s``, both included, between which no factor changes. [E + 1] float64."""
        cuts = [np.array([start_s, end_s])]
        diurnal, drift = self._recipe.diurnal, self._recipe.drift
        if diurnal is not None:
            cuts.append(_multiples(diurnal.period_s / _DIURNAL_STEPS, start_s, end_s))
        if drift is not None:
            cuts.append(_multiples(drift.every_s, start_s, end_s))
        for crowd in self._recipe.flash_crowds:
            ends = np.array([crowd.at_s, crowd.at_s + crowd.duration_s])
            cuts.append(ends[(ends > start_s) & (ends < end_s)])
        return np.unique(np.concatenate(cuts))

    def slab(self, start_s: float, end_s: float) -> "Slab":
        return Slab(self._recipe, self._rates, self.edges(start_s, end_s))


class Slab:
    """Modulation from one time to a later one. What does not depend on the adapter is worked out once."""

    def __init__(self, recipe: Recipe, rates: _Floats, edges: _Floats) -> None:
        self.edges = edges
        """[E + 1] float64."""
        self._recipe = recipe
        self._rates = rates
        middles_s = (edges[:-1] + edges[1:]) / 2
        self._shared = np.ones(len(middles_s))
        if recipe.diurnal is not None:
            phase = 2 * math.pi * middles_s / recipe.diurnal.period_s
            self._shared -= recipe.diurnal.amplitude * np.cos(phase)
        self._moved: npt.NDArray[np.int64] | None = None
        if recipe.drift is not None:
            self._moved = recipe.drift.shift * np.floor(middles_s / recipe.drift.every_s).astype(np.int64)
        self._crowds = [
            (crowd, inside)
            for crowd in recipe.flash_crowds
            if (inside := (middles_s >= crowd.at_s) & (middles_s < crowd.at_s + crowd.duration_s)).any()
        ]

    def factors(self, adapter: int) -> _Floats:
        """Of the adapter's rate, between each two edges. [E] float64."""
        factors: _Floats = self._shared
        num = len(self._rates)
        for crowd, inside in self._crowds:
            if crowd.first <= adapter < crowd.first + (num if crowd.count is None else crowd.count):
                factors = np.where(inside, factors * crowd.factor, factors)
        if self._moved is not None:
            factors = factors * (self._rates[(adapter - self._moved) % num] / self._rates[adapter])
        return factors


class OnOffSwitch:
    """One adapter's times of being on and off. Stateful: slabs must follow each other."""

    def __init__(self, mean_on_s: float, mean_off_s: float, rng: np.random.Generator) -> None:
        self._means_s = (mean_off_s, mean_on_s)
        self._rng = rng
        self._on = bool(rng.random() < mean_on_s / (mean_on_s + mean_off_s))
        self._switch_s = self._draw_s()
        self._factor = (mean_on_s + mean_off_s) / mean_on_s

    def apply(self, edges: _Floats, factors: _Floats) -> tuple[_Floats, _Floats]:
        """``edges`` [E + 1] and ``factors`` [E] with this switch's own edges added and its factor applied."""
        was_on, switches = self._on, []
        while self._switch_s < edges[-1]:
            switches.append(self._switch_s)
            self._on = not self._on
            self._switch_s += self._draw_s()
        if not switches:
            return edges, factors * (self._factor if was_on else 0.0)
        merged = np.sort(np.concatenate([edges, switches]))
        of_edge = np.searchsorted(edges, merged[:-1], side="right") - 1
        flips = np.searchsorted(np.array(switches), merged[:-1], side="right")
        on = (flips % 2 == 0) == was_on
        return merged, factors[of_edge] * np.where(on, self._factor, 0.0)

    def _draw_s(self) -> float:
        return float(self._rng.exponential(self._means_s[self._on]))


def _multiples(step_s: float, start_s: float, end_s: float) -> _Floats:
    """Of ``step_s``, strictly between the two."""
    multiples = np.multiply(
        np.arange(math.floor(start_s / step_s) + 1, math.ceil(end_s / step_s)), step_s, dtype=np.float64
    )
    return multiples[(multiples > start_s) & (multiples < end_s)]
