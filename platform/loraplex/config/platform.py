"""The whole platform's configuration: one YAML file, composed of the parts' own structs.

Owns the composition and the rules between parts; each part owns its own fields. The launcher, the controller actor
and the CLI read it. Unknown keys are errors that name their path.
"""

from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import yaml

from loraplex.config.problems import Problem, wrong_values
from loraplex.controller.config import ControllerConfig, ControllerOptions
from loraplex.core.errors import BadConfig
from loraplex.core.ids import BaseModelId
from loraplex.core.tenant import TenantLimits
from loraplex.engine.config import EngineConfig
from loraplex.gateway.config import GatewayConfig
from loraplex.model_runner.config import ExecutorConfig
from loraplex.registry.config import RegistryConfig
from loraplex.replica.config import ReplicaConfig
from loraplex.router.config import RouterConfig
from loraplex.telemetry.config import TelemetryConfig
from loraplex.tenancy.config import TenancyConfig
from loraplex.testing.paced_config import PacedConfig
from loraplex.traces.config import TraceConfig

DEMO_MODEL = "demo"


class BaseModelConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One base model and the replicas that pin it."""

    id: str
    """What clients write as ``model``."""
    model: str
    """A Hugging Face directory, a .gguf file, ``random:NAME``, or ``demo`` for the demo base."""
    tokenizer: str | None = None
    """Directory of the tokenizer; by default that of ``model``."""
    replicas: int = 1
    """As long as no plan is in force: groups of one replica each. 0: one starts when the base is asked for."""
    num_cpus: float = 1.0
    """Logical CPUs that each rank of a group reserves in its placement group."""
    num_gpus: float = 0.0
    """Logical GPUs of each of its ranks; 0: it runs on CPUs. Several bases that a plan puts on one group share them."""
    executor: ExecutorConfig = msgspec.field(default_factory=ExecutorConfig)
    """How it computes: device, number format, arena size."""
    engine: EngineConfig = msgspec.field(default_factory=EngineConfig)
    paced: PacedConfig | None = None
    """For tests and measurements of the platform without its GPUs: replicas compute nothing and take the time of a cost
    profile. Of ``executor`` only ``num_pages`` then counts."""

    @property
    def base_model_id(self) -> BaseModelId:
        return BaseModelId(self.id)


class ListenConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where clients reach the platform."""

    host: str = "127.0.0.1"
    """Of HTTP, and of gRPC behind HAProxy; with ``serve.proxy: python`` gRPC listens on all interfaces. So do, always,
    Serve's inner gRPC ports, one per gateway from 40000 on and one of its stand-by proxy: close them in the firewall of
    a machine that is not trusted. Every call but health and reflection needs a key there too. On a cluster of several
    nodes 0.0.0.0, so that a node's HAProxy reaches the gateways of the others."""
    http_port: int = 8000
    """Of the OpenAI-compatible API."""
    grpc_port: int = 9000
    """Of ``loraplex.v1.Loraplex``."""


class ServeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the gateways run under Ray Serve."""

    proxy: Literal["haproxy", "python"] = "haproxy"
    """What stands between clients and gateways. ``haproxy``: the HAProxy that ``ray[serve]`` brings on Linux, which
    passes bytes straight to a gateway. ``python``: Serve's own proxies, for other systems; slower. Serve reads it when
    it starts: on a cluster where it runs already, its own setting holds, and our start says so."""
    gateways: int = 1
    """Gateway processes, spread over the nodes."""
    gateway_num_cpus: float = 0.0
    """Logical CPUs that each of them reserves."""
    gateway_resources: dict[str, float] = {}
    """Further Ray resources that each gateway takes: ``{"node:__internal_head__": 0.001}`` keeps them on the head."""
    max_ongoing_requests: int = 4096
    """Open client requests per gateway; it answers more with 429."""
    drain_timeout_s: Annotated[float, msgspec.Meta(gt=0)] = 600.0
    """A gateway that an upgrade replaces takes no new requests and lets those that are open go on for so long."""


class RayConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which Ray the platform runs on."""

    address: str = "local"
    """``local`` starts a Ray of our own and ends it with us; ``auto`` or host:port joins a running cluster."""
    single_machine: bool = False
    """All nodes of the cluster that is joined are on this machine, as in fault tests: Serve's proxy runs on the head
    alone, and its HAProxy has files and ports of its own, as with a local Ray."""
    num_cpus: int | None = None
    """Logical CPUs of a local Ray; by default those of the machine."""
    num_gpus: int | None = None
    """Logical GPUs of a local Ray; by default those that it finds."""
    object_store_bytes: int = 128 * 1024 * 1024
    """Of a local Ray. Tokens do not pass through it."""
    gpu_types: dict[str, str] = msgspec.field(default_factory=lambda: {"H100": "h100-80gb", "H200": "h200-141gb"})
    """Ray's accelerator type (the resource ``accelerator_type:H100`` of a node) -> the GPU type of plans and cost
    profiles. A type that is not named here goes by Ray's name."""


class TenantBootstrap(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A tenant that is created at the first start; later changes through the API stay."""

    name: str
    """1 to 63 of a-z, 0-9, '.', '_' and '-', the first a letter or digit."""
    limits: TenantLimits = msgspec.field(default_factory=TenantLimits)


class PlatformConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    base_models: tuple[BaseModelConfig, ...]
    data_dir: str = ".loraplex"
    """Control database, artifacts, traces, caches and demo.json, unless their own settings say otherwise."""
    demo: bool = False
    """Register the demo tenants and adapters, and write demo.json."""
    listen: ListenConfig = msgspec.field(default_factory=ListenConfig)
    serve: ServeConfig = msgspec.field(default_factory=ServeConfig)
    ray: RayConfig = msgspec.field(default_factory=RayConfig)
    gateway: GatewayConfig = msgspec.field(default_factory=GatewayConfig)
    router: RouterConfig = msgspec.field(default_factory=RouterConfig)
    replica: ReplicaConfig = msgspec.field(default_factory=ReplicaConfig)
    controller: ControllerConfig = msgspec.field(default_factory=ControllerConfig)
    registry: RegistryConfig = msgspec.field(default_factory=RegistryConfig)
    tenancy: TenancyConfig = msgspec.field(default_factory=TenancyConfig)
    traces: TraceConfig = msgspec.field(default_factory=TraceConfig)
    telemetry: TelemetryConfig = msgspec.field(default_factory=TelemetryConfig)
    tenants: tuple[TenantBootstrap, ...] = ()
    admin_key_file: str | None = None
    """Holds the administrator's key; made at the first start when it does not exist. By default
    ``data_dir``/admin.key. On a cluster: a mounted secret."""

    @property
    def root(self) -> Path:
        return Path(self.data_dir).expanduser()

    @property
    def admin_key_path(self) -> Path:
        return Path(self.admin_key_file).expanduser() if self.admin_key_file else self.root / "admin.key"

    @property
    def trace_url(self) -> str:
        return self.traces.url or str(self.root / "traces")

    def controller_options(self) -> ControllerOptions:
        """What the controller needs of all this."""
        return ControllerOptions(
            data_dir=self.root,
            controller=self.controller,
            registry=self.registry,
            tenancy=self.tenancy,
        )


class _Loader(yaml.SafeLoader):
    """YAML itself lets the last of two equal keys win, unheard."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key is no word", key.start_mark)
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} appears twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def load_platform_config(path: str | Path) -> PlatformConfig:
    """Reads and checks one YAML file. Raises BadConfig naming the file and the key; relative ``data_dir`` and model
    paths are taken from the working directory."""
    return parse_platform_config(read_text(path), source=str(path))


def read_text(path: str | Path) -> str:
    """Of a config file. Raises BadConfig naming it."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise BadConfig(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise BadConfig(f"{path}: is no text in UTF-8") from None


def parse_platform_config(text: str, *, source: str) -> PlatformConfig:
    """``source`` is named in errors. Raises BadConfig with the first of what is wrong; ``config check`` tells all."""
    config, problems = read_config(text)
    if config is None:
        more = f" (and {len(problems) - 1} more: loraplex config check)" if len(problems) > 1 else ""
        raise BadConfig(f"{source}: {problems[0]}{more}", param=problems[0].path.partition(".")[0].partition("[")[0])
    return config


def read_config(text: str) -> tuple[PlatformConfig | None, tuple[Problem, ...]]:
    """The config, or all that is wrong with it."""
    try:
        data = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        return None, (Problem("", f"not YAML: {' '.join(str(error).split())}"),)
    problems = wrong_values(data, PlatformConfig)
    if problems:
        return None, problems
    config = msgspec.convert(data, PlatformConfig)
    problems = tuple(_broken_rules(config))
    return (None, problems) if problems else (config, ())


def _broken_rules(config: PlatformConfig) -> Iterator[Problem]:
    """Between parts."""
    if not config.base_models:
        yield Problem("base_models", "there are none")
    seen: set[str] = set()
    for index, base in enumerate(config.base_models):
        where = f"base_models[{index}]"
        if base.id in seen:
            yield Problem(f"{where}.id", f"{base.id!r} appears twice")
        seen.add(base.id)
        if base.replicas < 0:
            yield Problem(f"{where}.replicas", f"must not be negative, got {base.replicas}")
        if base.num_cpus <= 0 and base.num_gpus <= 0:
            yield Problem(where, "a replica needs num_cpus or num_gpus")
        for limit, bound in (("max_running", "max_rows"), ("max_step_tokens", "max_step_tokens")):
            asked, most = getattr(base.engine, limit), getattr(base.executor, bound)
            if asked > most:
                yield Problem(f"{where}.engine.{limit}", f"{asked} is more than executor.{bound} ({most})")
    if config.demo and not any(base.model == DEMO_MODEL for base in config.base_models):
        yield Problem("demo", f"is true but no base model is `model: {DEMO_MODEL}`")
    for name, port in (("http_port", config.listen.http_port), ("grpc_port", config.listen.grpc_port)):
        if not 0 <= port <= 65535:
            yield Problem(f"listen.{name}", f"{port} is not a port")
    if config.listen.http_port == config.listen.grpc_port != 0:
        yield Problem("listen.grpc_port", f"{config.listen.grpc_port} is http_port, too")
    names = [tenant.name for tenant in config.tenants]
    for index, name in enumerate(names):
        if name in names[:index]:
            yield Problem(f"tenants[{index}].name", f"{name!r} appears twice")
