"""One platform on one local Ray for the whole folder: the demo base, its tenants and adapters, on free ports.

It runs in this process behind Serve's Python proxies. ``behind_haproxy`` is a ``loraplex serve`` behind the default,
HAProxy, so that both paths are tested; ``test_serve_command.py`` kills it, starts it again and ends it.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from loraplex.config.platform import PlatformConfig, parse_platform_config
from loraplex.demo.base import prepare_demo_base
from loraplex_deployments.bootstrap import ensure_admin_key, ensure_tenants
from loraplex_deployments.demo_setup import ensure_demo
from loraplex_deployments.launch import start_platform
from loraplex_deployments.ports import free_port

from tests.deployments.joined_cluster import Cluster
from tests.deployments.served import Served


@dataclass(frozen=True)
class Demo:
    """What ``demo.json`` says."""

    content: dict[str, Any]

    @property
    def http(self) -> str:
        return str(self.content["http"])

    @property
    def grpc(self) -> str:
        return str(self.content["grpc"])

    def key(self, tenant: str) -> str:
        return next(str(entry["key"]) for entry in self.content["tenants"] if entry["name"] == tenant)


def demo_config(root: Path) -> PlatformConfig:
    text = f"""
demo: true
tenants: [{{name: initech, limits: {{requests_per_minute: 3}}}}]
data_dir: {root}
listen: {{http_port: {free_port()}, grpc_port: {free_port()}}}
serve: {{proxy: python}}
base_models:
  - id: smollm2-135m-instruct
    model: demo
    executor: {{num_threads: 2, num_pages: 400}}
    engine: {{max_step_tokens: 256}}
traces: {{write_interval_s: 0.5, send_interval_s: 0.2}}
"""
    return parse_platform_config(text, source="test")


@pytest.fixture(scope="session")
def demo_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache folder with the demo base in it, converted once for all tests."""
    folder = tmp_path_factory.mktemp("models")
    prepare_demo_base(folder, print)
    return folder


@pytest.fixture(scope="session")
def demo(demo_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    config = demo_config(tmp_path_factory.mktemp("platform"))
    (config.root / "models").symlink_to(demo_models)
    platform = start_platform(config, print)
    try:
        admin_key = ensure_admin_key(platform, config)
        ensure_tenants(platform, config)
        content = ensure_demo(platform, config.root / "demo.json", "smollm2-135m-instruct", admin_key)
        platform.wait_ready()
        assert json.loads((config.root / "demo.json").read_text()) == content
        yield Demo(content=content)
    finally:
        platform.stop()


@pytest.fixture(scope="session")
def behind_haproxy(demo_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(tmp_path_factory.mktemp("haproxy"), demo_models)
    served.start()
    try:
        served.wait_ready()
        yield served
    finally:
        served.stop()


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    cluster = Cluster()
    yield cluster
    assert cluster.process.stdin is not None
    cluster.process.stdin.close()
    cluster.process.wait(60)
