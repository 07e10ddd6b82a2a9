"""Computes what the engine decides: `StepPlan` in, `StepResult` out. The only importer of `loraplex_kernels`."""
