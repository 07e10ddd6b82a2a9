"""Computes what the engine decides: ``StepPlan`` in, ``StepResult`` out. The only importer of ``loraplex_kernels``.

Knows no tenants, queues or networks. Called by ``replica``, ``profiler`` and the benchmarks.
"""

from loraplex.model_runner.build import build_executor, load_model_spec
from loraplex.model_runner.config import ExecutorConfig
from loraplex.model_runner.executor import TorchExecutor

__all__ = ["ExecutorConfig", "TorchExecutor", "build_executor", "load_model_spec"]
