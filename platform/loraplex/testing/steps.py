"""One step at a time on any executor. Used by tests and benchmarks that build their own plans."""

from loraplex.core.step import Executor, StepPlan, StepResult


def run_step(executor: Executor, plan: StepPlan) -> StepResult:
    """Submits and collects; nothing else is in flight."""
    executor.submit(plan)
    return executor.collect()
