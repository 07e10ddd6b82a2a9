"""A recipe's trace as ``Arrivals``, for who sends or simulates it at once. Called by benchmarks."""

import tempfile
from pathlib import Path

import pyarrow.parquet as pq

from loraplex.core.errors import BadConfig
from loraplex.traces.arrivals import Arrivals, read_arrivals
from loraplex.traces.synth.generate import generate
from loraplex.traces.synth.recipe import Recipe


def synthetic_arrivals(recipe: Recipe) -> Arrivals:
    """From second 0 on. BadConfig for a recipe that makes no request; errors as ``generate``."""
    tables = list(generate(recipe))
    if not tables:
        raise BadConfig("the recipe makes no request", param="recipe")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.parquet"
        with pq.ParquetWriter(path, tables[0].schema) as writer:
            for table in tables:
                writer.write_table(table)
        return read_arrivals(path)
