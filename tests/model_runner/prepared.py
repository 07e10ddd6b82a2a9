"""Steps that are prepared before they may run."""

from typing import Any

from loraplex.core.step import StepPlan


def prepare_each(executor: Any) -> None:
    """Makes ``submit`` prepare its step first; ends with the executor."""
    submit = executor.submit

    def both(plan: StepPlan) -> None:
        executor.prepare(plan)
        submit(plan)

    executor.submit = both
