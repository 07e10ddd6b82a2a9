"""Experiments of a tiny fleet on a CPU."""

import json
from pathlib import Path
from typing import Any

from loraplex.bench.fleet.options import Experiment, read_experiment

FIELDS: dict[str, Any] = {
    "gpus": 2,
    "gpu": "cpu",
    "device": "cpu",
    "threads": 1,
    "bases": [
        {"name": "left", "model": "random:tiny-llama", "profile": "tiny"},
        {"name": "right", "model": "random:tiny-llama", "profile": "tiny"},
    ],
    "engine": {"max_running": 8, "max_step_tokens": 64},
    "targets": {base: {"ttft_s": 5.0, "tpot_s": 5.0} for base in ("left", "right")},
    "loads": {},
    "placements": ["1x1 apart", "2x1"],
    "planning_s": 5,
    "warm_s": 0.5,
    "seconds": 1.5,
}
RECIPE = {
    "adapters": 6,
    "rate": 10,
    "cv": 2,
    "skew": 1,
    "lengths": "lognormal:24,0.5,6,0.5",
    "max_prompt_tokens": 60,
    "max_output_tokens": 12,
}


def tiny_experiment(profile: Path, folder: Path, **fields: Any) -> Experiment:
    """From a file, ``experiment.json``."""
    path = folder / "experiment.json"
    path.write_text(json.dumps({**FIELDS, "profiles": [str(profile)], **fields}))
    return read_experiment(path)


def synthetic(**fields: Any) -> dict[str, Any]:
    return {"kind": "synthetic", "recipe": RECIPE, **fields}
