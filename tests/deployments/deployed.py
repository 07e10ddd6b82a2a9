"""``loraplex deploy`` and the other commands, run on a joined cluster, and the config that they deploy."""

import subprocess
from pathlib import Path

import httpx
import yaml
from loraplex_deployments.ports import free_port

from tests.deployments.joined_cluster import ENVIRONMENT, Cluster
from tests.deployments.served import LORAPLEX


class Config:
    """A config file for the cluster."""

    def __init__(self, folder: Path, cluster: Cluster) -> None:
        self.file = folder / "fleet.yaml"
        self.root = folder / "data"
        self.address = cluster.address
        self.content = {
            "data_dir": str(self.root),
            "tenants": [{"name": "acme"}],
            "listen": {"http_port": free_port(), "grpc_port": free_port()},
            "serve": {"proxy": "python"},
            "base_models": [{"id": "tiny", "model": "random:tiny-llama", "executor": {"num_pages": 64}}],
        }

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.content['listen']['http_port']}"  # type: ignore[call-overload]

    def write(self) -> str:
        self.file.write_text(yaml.safe_dump(self.content))
        return str(self.file)

    def deploy(self, *options: str) -> subprocess.CompletedProcess[str]:
        return loraplex("deploy", "--config", self.write(), "--address", self.address, *options)

    def complete(self) -> httpx.Response:
        """As the tenant, with a key that the administrator makes."""
        admin = (self.root / "admin.key").read_text().strip()
        made = httpx.post(
            f"{self.url}/v1/tenants/acme/keys", json={}, headers={"authorization": f"Bearer {admin}"}, timeout=60
        )
        return httpx.post(
            f"{self.url}/v1/completions",
            json={"model": "tiny", "prompt": "Hello", "max_tokens": 4, "ignore_eos": True},
            headers={"authorization": f"Bearer {made.json()['key']}"},
            timeout=60,
        )


def loraplex(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [LORAPLEX, *arguments], capture_output=True, text=True, timeout=300, env=ENVIRONMENT | variables
    )


def one_line(answer: subprocess.CompletedProcess[str], code: int) -> str:
    assert answer.returncode == code, answer.stdout + answer.stderr
    (line,) = answer.stderr.strip().splitlines()
    assert line.startswith("error: ")
    return line
