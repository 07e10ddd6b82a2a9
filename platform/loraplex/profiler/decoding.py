"""Decode steps of full batches, timed in one shape of a group: the rows by which shapes are compared.

A row is one batch without prompts in between: all its requests begin together and are equally long. Called by
``measure``; ``loraplex profile --rows`` writes them.
"""

import contextlib
import os
import platform
from pathlib import Path

import msgspec
import numpy as np

from loraplex.bench.options import EngineLoad
from loraplex.bench.session import BenchSession
from loraplex.core.errors import BadConfig

_LORA_RANK = 16
_MOST_INPUT = 64
_MOST_OUTPUT = 64
_BATCHES = (1, 8, 32, 128)
_ADAPTERS = (0, 1, 8, 64)


class DecodeRow(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    gpu: str
    tp: int
    pp: int
    batch: int
    """Requests that decode."""
    adapters: int
    """Distinct ones of rank 16 among them; 0: the plain base."""
    step_ms: float
    """Median time from a step's planning to its tokens. With several stages others are under way meanwhile, each with
    its share of the batch."""
    output_tokens_per_s: float


class DecodeRows(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of one model on one machine, in any number of shapes."""

    machine: str
    model: str
    threads: int | None
    """Of each rank on a CPU."""
    rows: tuple[DecodeRow, ...]

    @property
    def source(self) -> tuple[str, str, int | None]:
        return self.machine, self.model, self.threads

    def add_to(self, path: Path) -> None:
        """Writes what the file at ``path`` has of other shapes, if there is one, and these. BadConfig when it holds
        something else, or is of another machine or model."""
        known = self
        if path.exists():
            try:
                known = msgspec.json.decode(path.read_bytes(), type=DecodeRows)
            except msgspec.DecodeError as error:
                raise BadConfig(f"{path}: not a file of rows: {error}", param="rows") from error
        if known.source != self.source:
            raise BadConfig(f"{path}: its rows are of {known.source}, not of {self.source}", param="rows")
        shapes = {(row.gpu, row.tp, row.pp) for row in self.rows}
        kept = (row for row in known.rows if (row.gpu, row.tp, row.pp) not in shapes)
        joined = msgspec.structs.replace(self, rows=(*kept, *self.rows))
        path.write_bytes(msgspec.json.format(msgspec.json.encode(joined), indent=1) + b"\n")


def time_decoding(session: BenchSession, *, gpu: str, max_request_tokens: int, num_adapters: int) -> DecodeRows:
    """Batches and adapters as far as the session has room. ``num_adapters``: that fit."""
    setup = session.setup
    num_input = min(_MOST_INPUT, max_request_tokens // 2)
    num_output = min(_MOST_OUTPUT, max_request_tokens - num_input)
    rows = tuple(
        _time_batch(session, gpu=gpu, batch=batch, adapters=adapters, num_input=num_input, num_output=num_output)
        for batch in _BATCHES
        for adapters in _ADAPTERS
        if batch <= setup.max_running and adapters <= min(batch, num_adapters)
    )
    on_cpu = setup.device == "cpu"
    return DecodeRows(
        machine=f"{_cpu_name() if on_cpu else session.machine.device_name}, torch {session.machine.torch_version}",
        model=setup.model,
        threads=setup.threads if on_cpu else None,
        rows=rows,
    )


def _cpu_name() -> str:
    """Model and number of cores."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores"


def _time_batch(
    session: BenchSession, *, gpu: str, batch: int, adapters: int, num_input: int, num_output: int
) -> DecodeRow:
    load = EngineLoad(
        requests=batch,
        input_tokens=num_input,
        output_tokens=num_output,
        adapters=adapters,
        lora_ranks=(_LORA_RANK,),
    )
    manifests = session.prepare(load)
    session.engine.clear()
    session.drive(session.requests(load, manifests))
    engine = session.engine
    steps = engine.composition(manifests)
    decodes = (steps.prefill_rows == 0) & (steps.decode_rows > 0)
    return DecodeRow(
        gpu=gpu,
        tp=session.setup.tp,
        pp=session.setup.pp,
        batch=batch,
        adapters=adapters,
        step_ms=1e3 * float(np.median(engine.step_latencies()[decodes])),
        output_tokens_per_s=float(steps.decode_rows[decodes].sum() / engine.step_seconds()[decodes].sum()),
    )
