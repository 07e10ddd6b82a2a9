"""Computes what the engine decides: ``StepPlan`` in, ``StepResult`` out. The only importer of ``loraplex_kernels``.

Knows no tenants, queues or networks. Called by ``replica``, ``profiler`` and the benchmarks. Names are resolved when
first used, so that reading a configuration (``model_runner.config``) does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loraplex.model_runner.build import build_executor, load_model_spec
    from loraplex.model_runner.config import ExecutorConfig
    from loraplex.model_runner.executor_base import ExecutorBase

_HOMES = {
    "ExecutorBase": "executor_base",
    "ExecutorConfig": "config",
    "build_executor": "build",
    "load_model_spec": "build",
}

__all__ = ["ExecutorBase", "ExecutorConfig", "build_executor", "load_model_spec"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
