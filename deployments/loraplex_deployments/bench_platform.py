"""A platform for a measurement: one base, one tenant, made-up adapters that came in through the registry as files.

Starts it on a Ray and on ports of its own, and ends it. Called by ``bench_serve``.
"""

import contextlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import httpx
from loraplex.bench.options import EngineSetup
from loraplex.bench.peft_files import write_random_peft
from loraplex.bench.random_adapters import random_manifests
from loraplex.config.platform import PlatformConfig, parse_platform_config
from loraplex.core.errors import Unavailable
from loraplex.core.ids import BaseModelId, TenantName
from loraplex.core.tenant import Role, TenantLimits
from loraplex.loadgen.targets import Target
from loraplex.model_runner.build import load_model_spec
from loraplex.tenancy.keys import new_key

from loraplex_deployments.bench_results import ServeBenchOptions
from loraplex_deployments.launch import RunningPlatform, data_dir_lock, start_platform
from loraplex_deployments.ports import free_ports

BASE_ID = BaseModelId("bench")
_TENANT = TenantName("bench")
_PATIENCE_S = 3600.0
"""All requests may come at once, and none is to be refused for having waited."""
_VISIBLE_TIMEOUT_S = 30.0


@contextlib.contextmanager
def bench_platform(
    options: ServeBenchOptions, setup: EngineSetup, say: Callable[[str], None]
) -> Iterator[tuple[str, tuple[Target, ...]]]:
    """URL and targets of a platform that is ready: the adapters of ``options.load``, or the base where it has none.

    Raises what ``start_platform`` raises, Conflict for a data directory in use.
    """
    with contextlib.ExitStack() as stack:
        folder = options.data_dir or stack.enter_context(tempfile.TemporaryDirectory(prefix="loraplex-bench-"))
        stack.enter_context(data_dir_lock(Path(folder)))
        platform = start_platform(platform_config(options, setup, Path(folder)), say)
        stack.callback(platform.stop)
        key = new_key()
        platform.call("ensure_tenant", str(_TENANT), TenantLimits())
        platform.call("ensure_key", _TENANT, Role.MEMBER, key)
        names = _register_adapters(platform, options, setup, Path(folder), say)
        say("waiting for the base model to load")
        platform.wait_ready()
        models = names or [str(BASE_ID)]
        _wait_visible(platform.http_url, key, models)
        yield platform.http_url, tuple(Target(tenant=str(_TENANT), model=model, key=key) for model in models)


def platform_config(options: ServeBenchOptions, setup: EngineSetup, folder: Path) -> PlatformConfig:
    """The replica gets what the engine alone has: model, device, arena and sizes of a step."""
    http_port, grpc_port = free_ports(2)
    cuda = setup.device.startswith("cuda")
    base = {
        "id": BASE_ID,
        "model": setup.model,
        "tokenizer": options.tokenizer,
        "num_gpus": 1 if cuda else 0,
        "executor": {
            # Ray shows the replica its own devices alone.
            "device": "cuda" if cuda else setup.device,
            "dtype": setup.dtype,
            "num_threads": setup.threads,
            "tp": setup.tp,
            "pp": setup.pp,
            "num_pages": setup.num_pages,
            "max_rows": setup.max_running,
            "max_step_tokens": setup.max_step_tokens,
            "batch_invariant": setup.batch_invariant,
            "graph_patience": 0,
        },
        "engine": {"max_running": setup.max_running, "max_step_tokens": setup.max_step_tokens},
    }
    settings = {
        "data_dir": str(folder),
        "listen": {"http_port": http_port, "grpc_port": grpc_port},
        "serve": {"proxy": options.proxy, "gateways": options.gateways},
        "gateway": {"first_token_deadline_s": _PATIENCE_S},
        "base_models": [base],
    }
    return parse_platform_config(json.dumps(settings), source="bench serve")


def _register_adapters(
    platform: RunningPlatform,
    options: ServeBenchOptions,
    setup: EngineSetup,
    folder: Path,
    say: Callable[[str], None],
) -> list[str]:
    """Their names. Those that the data directory has from an earlier run stay as they are."""
    load = options.load
    if not load.adapters:
        return []
    say(f"registering {load.adapters} adapters of rank {load.lora_ranks[0]}")
    spec = load_model_spec(setup.model, BASE_ID)
    manifests = random_manifests(spec, count=load.adapters, lora_ranks=load.lora_ranks, modules=load.modules)
    kind = "-".join((f"rank{load.lora_ranks[0]}", *(name.removesuffix("_proj") for name in load.modules)))
    names = [f"{kind}-{index}" for index in range(load.adapters)]
    known = {
        view.ref.name for view in platform.call("snapshot", after_epoch=-1, after_version=-1, timeout_s=1).adapters
    }
    for index, (name, manifest) in enumerate(zip(names, manifests, strict=True)):
        if name in known:
            continue
        directory = folder / "new-adapter"
        write_random_peft(directory, manifest, spec, seed=index)
        platform.call("ensure_adapter", _TENANT, name, str(directory))
        shutil.rmtree(directory)
    return names


def _wait_visible(url: str, key: str, models: Sequence[str]) -> None:
    """Returns when the gateways' snapshots have the key and all ``models``. Raises Unavailable."""
    deadline_s = time.monotonic() + _VISIBLE_TIMEOUT_S
    listed: set[str] = set()
    while time.monotonic() < deadline_s:
        answer = httpx.get(f"{url}/v1/models", headers={"authorization": f"Bearer {key}"}, timeout=10)
        if answer.status_code == 200:
            listed = {entry["id"] for entry in answer.json()["data"]}
            if listed.issuperset(models):
                return
        time.sleep(0.1)
    raise Unavailable(f"the gateway lists {len(listed)} models, {len(models)} were registered")
