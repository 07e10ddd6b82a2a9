"""The requests of a simulation, checked and turned into indices; what does not depend on the plan.

Made once for many plans; a search hands it to each simulation. Called by ``cluster`` and both simulators.
"""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from loraplex.core.errors import InvalidInput
from loraplex.core.ids import ReplicaId
from loraplex.router.policy import affinity
from loraplex.simulator.types import AdapterSize, FloatArray, IntArray
from loraplex.traces.arrivals import AdapterName, Arrivals


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """R requests, A adapters, B bases."""

    arrivals: Arrivals
    bases: tuple[str, ...]
    """[B] that the trace names."""
    request_base: IntArray
    """[R] index into ``bases``; -1: the trace does not say."""
    adapter_base: IntArray
    """[A] likewise."""
    sizes: tuple[AdapterSize, ...]
    """The distinct sizes."""
    adapter_size: IntArray
    """[A] index into ``sizes``."""
    adapter_keys: tuple[str, ...]
    """[A] distinct names: tenant/name@base."""
    _affinities: dict[ReplicaId, FloatArray] = field(default_factory=dict)

    @classmethod
    def of(cls, arrivals: Arrivals, adapters: tuple[AdapterSize, ...]) -> "Workload":
        """InvalidInput naming the row of a time that is not finite, negative or falling, of an unknown adapter, or of
        a request without tokens; also for no rows at all."""
        _check(arrivals, len(adapters))
        bases = tuple(
            dict.fromkeys((*arrivals.base_models, *(a.base_model for a in arrivals.adapters if a.base_model)))
        )
        index_of: dict[str | None, int] = {None: -1, **{base: index for index, base in enumerate(bases)}}
        adapter_base = np.array([index_of[adapter.base_model] for adapter in arrivals.adapters], dtype=np.int32)
        with_adapter = arrivals.adapter >= 0
        request_base = arrivals.base_model.astype(np.int32, copy=True)
        unsaid = with_adapter & (request_base < 0)
        request_base[unsaid] = adapter_base[arrivals.adapter[unsaid]]
        sizes = tuple(dict.fromkeys(adapters))
        position = {size: index for index, size in enumerate(sizes)}
        return cls(
            arrivals=arrivals,
            bases=bases,
            request_base=request_base,
            adapter_base=adapter_base,
            sizes=sizes,
            adapter_size=np.array([position[size] for size in adapters], dtype=np.int32),
            adapter_keys=tuple(_key(adapter) for adapter in arrivals.adapters),
        )

    def __len__(self) -> int:
        return len(self.arrivals)

    def affinities(self, replica_id: ReplicaId) -> FloatArray:
        """[A] the router's affinity of each cold adapter to a replica of weight 1."""
        found = self._affinities.get(replica_id)
        if found is None:
            found = np.array([affinity(key.encode(), replica_id) for key in self.adapter_keys], dtype=np.float64)
            self._affinities[replica_id] = found
        return found


def _key(adapter: AdapterName) -> str:
    return f"{adapter.tenant or ''}/{adapter.name}@{adapter.base_model or ''}"


def _check(arrivals: Arrivals, num_adapters: int) -> None:
    if not len(arrivals):
        raise InvalidInput("the trace has no requests", param="trace")
    if num_adapters != len(arrivals.adapters):
        raise InvalidInput(
            f"the trace has {len(arrivals.adapters)} adapters, sizes are given for {num_adapters}", param="adapters"
        )
    times = arrivals.arrival_s
    _refuse(~np.isfinite(times), times, "arrival_s is not a finite number")
    _refuse(times < 0, times, "arrival_s is negative")
    _refuse(np.diff(times, prepend=0.0) < 0, times, "arrival_s is before the row above")
    _refuse(
        (arrivals.adapter < -1) | (arrivals.adapter >= num_adapters), arrivals.adapter, "adapter is not in the table"
    )
    _refuse(arrivals.prompt_tokens < 1, arrivals.prompt_tokens, "prompt_tokens is below 1 or not given")
    _refuse(arrivals.output_tokens < 1, arrivals.output_tokens, "output_tokens is below 1 or not given")


def _refuse(wrong: npt.NDArray[np.bool_], values: npt.NDArray[np.generic], what: str) -> None:
    if wrong.any():
        row = int(np.argmax(wrong))
        raise InvalidInput(f"trace row {row}: {what} ({values[row]})", param="trace")
