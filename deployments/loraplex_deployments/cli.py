"""CLI commands that need Ray. Found by ``loraplex`` through the entry-point group ``loraplex.commands``."""

import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from loraplex.config.platform import DEMO_MODEL, PlatformConfig, load_platform_config
from loraplex.demo import DEMO_ADAPTERS
from loraplex.demo.base import prepare_demo_base
from rich.console import Console

from loraplex_deployments.bootstrap import ensure_admin_key, ensure_tenants
from loraplex_deployments.demo_setup import ensure_demo
from loraplex_deployments.launch import Progress, RunningPlatform, data_dir_lock, start_platform
from loraplex_deployments.signals import on_signals

console = Console(highlight=False, soft_wrap=True)


def serve_command(
    config: Annotated[Path, typer.Option("--config", help="The platform's YAML file.")],
) -> None:
    """Serve: start the platform of a config file and run until Ctrl-C."""
    stop = on_signals(lambda: console.print("\nstopping"))
    settings = load_platform_config(config)
    with data_dir_lock(settings.root):
        _serve(settings, stop)


def progress_since(started_s: float) -> Progress:
    """Prints what happens with the seconds since ``started_s`` of the monotonic clock."""

    def progress(message: str) -> None:
        console.print(f"[dim]{time.monotonic() - started_s:6.1f} s[/dim]  {message}")

    return progress


def set_up(platform: RunningPlatform, config: PlatformConfig, progress: Progress) -> dict[str, Any] | None:
    """The administrator's key, the config's tenants and, if it asks for it, the demo, whose demo.json this returns."""
    admin_key = ensure_admin_key(platform, config)
    ensure_tenants(platform, config)
    if not config.demo:
        return None
    progress("registering the demo tenants and adapters")
    base = next(base for base in config.base_models if base.model == DEMO_MODEL)
    return ensure_demo(platform, config.root / "demo.json", base.id, admin_key)


def _serve(config: PlatformConfig, stop: threading.Event) -> None:
    say = progress_since(time.monotonic())

    def step(message: str) -> None:
        """Before each part of the start: none begins after Ctrl-C."""
        if stop.is_set():
            raise typer.Exit
        say(message)

    # The conversion of the demo base and the start of Ray overlap; the controller waits for the former.
    with ThreadPoolExecutor(max_workers=1) as pool:
        if any(base.model == DEMO_MODEL for base in config.base_models):
            pool.submit(prepare_demo_base, config.root / "models", say)
        platform = start_platform(config, step)
    with ExitStack() as started:
        started.callback(say, "stopped")
        started.callback(platform.stop)
        demo = set_up(platform, config, step)
        step("waiting for the base model to load")
        platform.wait_ready(stop.is_set)
        step("ready")
        print_addresses(config, demo, host=config.listen.host)
        console.print("Ctrl-C stops everything that was started.")
        stop.wait()


def print_addresses(config: PlatformConfig, demo: dict[str, Any] | None, *, host: str) -> None:
    """Where a client finds the platform, and examples to paste if there is a demo."""
    http_url, grpc_address = f"http://{host}:{config.listen.http_port}", f"{host}:{config.listen.grpc_port}"
    console.print(f"\nHTTP  {http_url}/v1    gRPC  {grpc_address}")
    console.print(f"admin key in {config.admin_key_path}")
    if demo is None:
        return
    for tenant in demo["tenants"]:
        console.print(f"\ntenant [bold]{tenant['name']}[/bold]   key {tenant['key']}")
        console.print(f"  models {', '.join(tenant['models'])}")
    tenant = demo["tenants"][0]
    model = tenant["models"][1]
    prompt = next(adapter.example_prompt for adapter in DEMO_ADAPTERS if adapter.name == model)
    console.print(
        _EXAMPLES.format(
            url=http_url,
            grpc=grpc_address,
            key=tenant["key"],
            model=model,
            prompt=prompt,
            python=sys.executable,
        ),
        markup=False,
    )
    console.print(f"All of this is in {config.root / 'demo.json'}.")


_EXAMPLES = """
curl:
curl {url}/v1/chat/completions -H 'Authorization: Bearer {key}' -H 'Content-Type: application/json' \\
  -d '{{"model": "{model}", "temperature": 0, "messages": [{{"role": "user", "content": "{prompt}"}}]}}'

openai ({python} -m pip install openai):
{python} - <<'EOF'
from openai import OpenAI
client = OpenAI(base_url="{url}/v1", api_key="{key}")
answer = client.chat.completions.create(
    model="{model}", temperature=0, messages=[{{"role": "user", "content": "{prompt}"}}])
print(answer.choices[0].message.content)
EOF

gRPC:
{python} - <<'EOF'
import grpc
from loraplex.gateway.proto import loraplex_v1_pb2 as pb, loraplex_v1_pb2_grpc as rpc
request = pb.GenerateRequest(
    model="{model}", chat=pb.ChatPrompt(messages=[pb.ChatMessage(role="user", content="{prompt}")]),
    sampling=pb.SamplingOptions(temperature=0, max_tokens=100))
for part in rpc.LoraplexStub(grpc.insecure_channel("{grpc}")).Generate(
        request, metadata=[("authorization", "Bearer {key}")]):
    print("".join(delta.text for delta in part.deltas), end="", flush=True)
print()
EOF
"""
