"""A head that is gone takes its cluster along. A new one with the same data directory has the tenants, keys and
adapters of before."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from loraplex.bench.peft_files import write_random_peft
from loraplex.bench.random_adapters import random_manifests
from loraplex.core.ids import BaseModelId
from loraplex.model_runner.build import load_model_spec

from tests.deployments.deployed import Config, loraplex
from tests.deployments.joined_cluster import Cluster


@pytest.fixture
def clusters() -> Iterator[list[Cluster]]:
    made: list[Cluster] = []
    yield made
    for cluster in made:
        lose(cluster)


def lose(cluster: Cluster) -> None:
    """As when its power fails: nothing is told, nothing is written."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(cluster.process.pid)
        processes = [process, *process.children(recursive=True)]
        for one in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        psutil.wait_procs(processes, timeout=30)
    cluster.process.wait(30)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_new_cluster_goes_on_from_the_data_of_one_whose_head_was_lost(
    clusters: list[Cluster], tmp_path: Path
) -> None:
    clusters.append(Cluster())
    config = Config(tmp_path, clusters[0])
    deployed = config.deploy()
    assert deployed.returncode == 0, deployed.stdout + deployed.stderr
    admin = (config.root / "admin.key").read_text().strip()
    tenant = f"{config.url}/v1/tenants/acme/keys"
    key = httpx.post(tenant, json={"role": "tenant_admin"}, headers=bearer(admin), timeout=60).json()["key"]
    base = BaseModelId("tiny")
    spec = load_model_spec("random:tiny-llama", base)
    write_random_peft(tmp_path / "peft", random_manifests(spec, count=1, lora_ranks=(8,))[0], spec, seed=1)
    registered = loraplex("adapter", "register", "kept", str(tmp_path / "peft"), "--url", config.url, "--key", key)
    assert registered.returncode == 0, registered.stdout + registered.stderr
    before = answer(config, key)

    lose(clusters[0])
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{config.url}/health", timeout=5)

    clusters.append(Cluster())
    config.address = clusters[1].address
    again = config.deploy()
    assert again.returncode == 0, again.stdout + again.stderr
    assert answer(config, key) == before


def answer(config: Config, key: str) -> str:
    """Of the adapter, by its first version."""
    body = {"model": "kept@1", "prompt": [1, 2, 3], "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    got = httpx.post(f"{config.url}/v1/completions", json=body, headers=bearer(key), timeout=60)
    assert got.status_code == 200, got.text
    return str(got.json()["choices"][0]["text"])


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}
