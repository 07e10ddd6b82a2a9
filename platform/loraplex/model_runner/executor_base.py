"""What a built executor is: a ``core.step.Executor`` that can also make up adapters, on one rank or on a group."""

from abc import ABC, abstractmethod

from loraplex.core.adapter import AdapterManifest
from loraplex.core.ids import Digest
from loraplex.core.model import ModelSpec
from loraplex.core.step import ArenaSpec, StepPlan, StepResult


class ExecutorBase(ABC):
    """See ``core.step.Executor`` for what the methods promise."""

    @property
    @abstractmethod
    def model(self) -> ModelSpec: ...

    @property
    @abstractmethod
    def arena(self) -> ArenaSpec: ...

    @property
    @abstractmethod
    def itemsize(self) -> int:
        """Bytes of an element of KV and adapters."""

    @property
    @abstractmethod
    def max_in_flight(self) -> int: ...

    @property
    @abstractmethod
    def num_stages(self) -> int: ...

    @abstractmethod
    def check(self) -> None: ...

    @abstractmethod
    def adapter_pages(self, manifest: AdapterManifest) -> int:
        """Pages that the adapter takes. Pure. BadAdapter when it does not fit the base."""

    @abstractmethod
    def stage_adapter(self, manifest: AdapterManifest, path: str) -> None:
        """Reads the safetensors file at ``path`` into the host tier. Any thread. BadAdapter, NotFound."""

    @abstractmethod
    def stage_random_adapter(self, manifest: AdapterManifest, seed: int) -> None:
        """As ``stage_adapter`` with random weights: for benchmarks. Any thread. BadAdapter."""

    @abstractmethod
    def unstage_adapter(self, digest: Digest) -> None: ...

    @abstractmethod
    def load_adapter(self, digest: Digest, pages: tuple[int, ...]) -> None: ...

    @abstractmethod
    def drop_adapter(self, digest: Digest) -> None: ...

    @abstractmethod
    def prepare(self, plan: StepPlan) -> None:
        """See ``turns.executor.PreparingExecutor``."""

    @abstractmethod
    def submit(self, plan: StepPlan) -> None: ...

    @abstractmethod
    def collect(self) -> StepResult: ...

    @abstractmethod
    def close(self) -> None: ...
