"""What ``loraplex bench serve`` can be asked for and what it found. Pure data, the same as JSON."""

import msgspec
from loraplex.bench.options import EngineLoad, EngineSetup
from loraplex.bench.results import LoadResult
from loraplex.loadgen.report import LoadReport


class ServeBenchOptions(msgspec.Struct, frozen=True, kw_only=True):
    """One load, for the platform and for the engine alone."""

    setup: EngineSetup | None
    """Base model, device and sizes of the engine alone and of the platform's replica. None: the engine alone is not
    measured, which takes a running platform."""
    load: EngineLoad
    """``concurrency`` is the number of streams. One rank, round-robin, adapters resident."""
    single_ttft: int = 0
    """Lone requests of one token in each turn, for their TTFT."""
    starts: int = 1
    """How often both sides start anew: where a process's memory comes to lie makes it faster or slower for its life."""
    rounds: int = 3
    """Turns of the engine alone and of HTTP in each start."""
    client_processes: int = 1
    gateways: int = 1
    proxy: str = "haproxy"
    """``serve.proxy`` of the platform that is started."""
    tokenizer: str | None = None
    """Directory. With a platform that is started: its base's, None for the model's own; prompts are token ids. With a
    running one: what makes texts of exact length; None: token ids of the model, or without one about as many words."""
    data_dir: str | None = None
    """Of the platform that is started, whose adapters are used again; None: a temporary one."""
    url: str | None = None
    """Of a running platform; None: one is started."""


class RoleCpu(msgspec.Struct, frozen=True, kw_only=True):
    seconds: float
    cores: float
    """seconds / duration of the load: how many cores it kept busy."""
    ms_per_token: float


class HttpTurn(msgspec.Struct, frozen=True, kw_only=True):
    report: LoadReport
    cpu: dict[str, RoleCpu]
    """By role: gateway, haproxy, replica and so on where the platform was started here; client always."""
    client_processes: int
    busiest_client: float
    """Share of the duration in which the busiest client process computed: near 1 the client was the limit."""


class Round(msgspec.Struct, frozen=True, kw_only=True):
    engine: LoadResult | None
    http: HttpTurn
    single_engine: LoadResult | None
    single_http: LoadReport | None


class Compared(msgspec.Struct, frozen=True, kw_only=True):
    """Medians over the rounds of all starts; the last two None without the engine alone."""

    http: float
    engine: float | None
    added: float | None
    """Median of http - engine."""


class ServeMachine(msgspec.Struct, frozen=True, kw_only=True):
    device_name: str | None
    """Of the engine alone."""
    cores: int
    """Logical, of this machine."""
    num_pages: int | None
    """Of each of the two arenas."""
    python_version: str
    torch_version: str
    ray_version: str


class ServeSummary(msgspec.Struct, frozen=True, kw_only=True):
    """Medians over the rounds of all starts."""

    http_tokens_per_s: float
    engine_tokens_per_s: float | None
    http_over_engine: float | None
    """Median of the rounds' ratios."""
    ttft_ms: dict[str, Compared]
    """p50, p90 and p99 over the requests, from when one was sent."""
    tpot_ms: dict[str, Compared]
    single_ttft_ms: dict[str, Compared]
    """The same of lone requests; empty without them."""
    cpu: dict[str, RoleCpu]
    busiest_client: float
    """The largest of the rounds."""
    errors: dict[str, int]
    """Of all rounds: HTTP status or kind, and how many."""


class ServeBenchResult(msgspec.Struct, frozen=True, kw_only=True):
    options: ServeBenchOptions
    machine: ServeMachine
    summary: ServeSummary
    rounds: tuple[Round, ...]
    """Those of all starts, in order."""
