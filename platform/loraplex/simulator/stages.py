"""The stages of a group on a virtual clock: when each step begins and when its tokens are there.

Steps pass the stages one behind the other, each taking as long in every stage as in the slowest: where the way through
takes as many intervals, a flow line of equal stages, exactly. A step begins when the tokens of the one as many steps
before as there are stages are back at the first stage. Called by ``exact_replica`` and by the paced executor of
``testing``; pure.
"""

from collections import deque
from typing import NamedTuple


class StepSpan(NamedTuple):
    begin_s: float
    end_s: float
    busy_s: float
    """Of that, after the end of the step before."""


class StageLine:
    def __init__(self, num_stages: int) -> None:
        self._first_free_s = 0.0
        self._ends_s = deque([0.0] * num_stages, maxlen=num_stages)
        """Of the last steps, as many as there are stages."""

    def enter(self, at_s: float, *, latency_s: float, interval_s: float) -> StepSpan:
        """The next step, not before ``at_s``. ``latency_s``: through all stages; ``interval_s``: in the slowest."""
        last_end_s = self._ends_s[-1]
        begin_s = max(at_s, self._first_free_s, self._ends_s[0])
        end_s = max(begin_s + latency_s, last_end_s + interval_s)
        self._first_free_s = begin_s + interval_s
        self._ends_s.append(end_s)
        return StepSpan(begin_s, end_s, end_s - max(begin_s, last_end_s))
