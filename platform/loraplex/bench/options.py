"""What the engine benchmark can be asked for: a machine with a model, and loads to put on it. Pure data.

Called by ``engine_bench``, ``sweep`` and the command line.
"""

from typing import Annotated

import msgspec

from loraplex.bench.random_adapters import Popularity
from loraplex.core.errors import BadConfig
from loraplex.core.model import LORA_MODULES
from loraplex.core.plan import Shape

_AtLeastOne = Annotated[int, msgspec.Meta(ge=1)]
_NotNegative = Annotated[int, msgspec.Meta(ge=0)]


class EngineSetup(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Loaded once, for any number of loads."""

    model: str
    """A Hugging Face directory, a .gguf file, or ``random:NAME``."""
    device: str = "cpu"
    dtype: str = "auto"
    tp: _AtLeastOne = 1
    """Shards of every layer, as ``ExecutorConfig.tp``; their ranks are processes of this machine."""
    pp: _AtLeastOne = 1
    """Stages of the layers."""
    threads: _AtLeastOne | None = None
    """torch threads on the CPU, of each rank; None leaves torch's choice."""
    max_running: _AtLeastOne = 256
    max_step_tokens: _AtLeastOne = 2048
    num_pages: _AtLeastOne | None = None
    """Pages of the arena; None leaves the executor's choice."""
    memory_fraction: float = 0.9
    """Share of the accelerator's memory that may be in use when the arena is there."""
    batch_invariant: bool = False
    """As ``ExecutorConfig.batch_invariant``."""
    ceilings: str | None = None
    """A known GPU, or a JSON file of ``kernels/benchmarks/ceilings.py``. None: by the device's name, or measured."""

    @property
    def shape(self) -> Shape:
        return Shape(tp=self.tp, pp=self.pp)


class EngineLoad(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Random prompts, greedy decoding, exactly ``output_tokens`` each."""

    requests: _AtLeastOne = 64
    input_tokens: _AtLeastOne = 256
    output_tokens: _AtLeastOne = 128
    adapters: _NotNegative = 0
    """Distinct ones at hand; 0 means the plain base."""
    lora_ranks: tuple[_AtLeastOne, ...] = (16,)
    """Of the adapters, in turn."""
    modules: tuple[str, ...] = LORA_MODULES
    popularity: Popularity = Popularity.ROUND_ROBIN
    zipf_exponent: float = 1.0
    resident: bool = True
    """True: as many adapters as fit are on the accelerator before the clock starts. False: in host memory only."""
    adapter_bytes_cap: _AtLeastOne | None = None
    """Bytes of pages that adapters may hold on the accelerator; None: no limit of their own."""
    concurrency: _AtLeastOne | None = None
    """Unfinished requests at a time; None submits all at once."""
    warmup_requests: _NotNegative | None = None
    """Short requests of the same kind that run before the clock starts; None: as many as run at once."""
    seed: _NotNegative = 0

    def check(self) -> None:
        """Raises BadConfig where fields contradict each other or name nothing."""
        unknown = set(self.modules) - set(LORA_MODULES)
        if unknown or not self.modules:
            raise BadConfig(
                f"modules: {', '.join(sorted(unknown)) or 'none'} (known: {', '.join(LORA_MODULES)})", param="modules"
            )
        if not self.lora_ranks:
            raise BadConfig("give at least one LoRA rank", param="lora_ranks")


class EngineBenchOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One load, and what else to look at with the same model."""

    setup: EngineSetup
    load: EngineLoad = EngineLoad()
    single_ttft: _NotNegative = 0
    """Requests of each kind (base, warm adapter, cold adapter) that are sent one at a time for their TTFT."""
    profile_steps: _NotNegative = 0
    """Decode steps, after the prefill of the same load, whose time is shared out by part."""
    profile_trace: str | None = None
    """File for the timeline of those decode steps, as Chrome and Perfetto read it; ``.json`` or ``.json.gz``."""

    def check(self) -> None:
        """Raises BadConfig."""
        self.load.check()
        if self.profile_trace is not None:
            if not self.profile_steps:
                raise BadConfig("a timeline needs steps to profile", param="profile_steps")
            if not self.profile_trace.endswith((".json", ".json.gz")):
                raise BadConfig(f"{self.profile_trace}: should end in .json or .json.gz", param="profile_trace")


def module_names(text: str) -> tuple[str, ...]:
    """``q,k,v,o`` or full names, or ``all``, in layer order. BadConfig for an unknown one."""
    if text == "all":
        return LORA_MODULES
    short = {name.removesuffix("_proj"): name for name in LORA_MODULES}
    words = [word.strip() for word in text.split(",")]
    unknown = [word for word in words if word not in short and word not in LORA_MODULES]
    if unknown:
        raise BadConfig(f"no projection is called {unknown[0]!r} (known: {', '.join(short)})", param="modules")
    chosen = {short.get(word, word) for word in words}
    return tuple(name for name in LORA_MODULES if name in chosen)
