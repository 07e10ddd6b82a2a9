"""kill -9 in the middle of uploads, commits and deletions: what was acknowledged is there, what is there is whole."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from loraplex.controller.config import ControllerOptions
from loraplex.core.ids import TenantName
from loraplex.core.tenant import Role

CHILD = """
import asyncio, json, sys
from pathlib import Path
import numpy as np
from safetensors.numpy import save
from loraplex.controller.config import ControllerConfig, ControllerOptions
from loraplex.controller.controller import Controller
from loraplex.core.control import BaseModelView
from loraplex.core.model import ModelSpec
from loraplex.core.tenant import TenantLimits
from loraplex.database.config import DatabaseConfig
from loraplex.registry.config import RegistryConfig
from loraplex.tenancy import TenancyConfig

data_dir, first, database_url = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
SPEC = ModelSpec(base_model_id="tiny", family="llama", hidden_size=64, intermediate_size=24, num_layers=1, num_heads=4,
    num_kv_heads=2, head_dim=16, vocab_size=32, max_context_tokens=64, rms_norm_eps=1e-5, rope_theta=1e4)
PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"
CONFIG = json.dumps({"peft_type": "LORA", "r": 64, "lora_alpha": 8, "target_modules": ["q_proj"]}).encode()

def say(*words):
    print(*words, flush=True)

async def work(controller, lane):
    number = first + lane
    while True:
        rng = np.random.default_rng(number)
        content = save({f"{PREFIX}.lora_{part}.weight": rng.normal(size=(64, 64)).astype("f4") for part in "AB"})
        upload = await controller.begin_upload("acme", f"adapter-{lane}")
        await controller.append_upload(upload, "adapter_config.json", CONFIG)
        for start in range(0, len(content), 8192):
            await controller.append_upload(upload, "adapter_model.safetensors", content[start:start + 8192])
        view = await controller.commit_upload(upload)
        say("stored", view.ref.name, view.ref.version, view.ref.digest)
        if number % 5 == 0 and view.ref.version > 1:
            say("deleting", view.ref.name, view.ref.version - 1)
            await controller.delete_adapter("acme", view.ref.name, view.ref.version - 1)
        number += 3

async def main():
    database = DatabaseConfig(url=database_url)
    options = ControllerOptions(data_dir=data_dir, controller=ControllerConfig(database=database),
        registry=RegistryConfig(), tenancy=TenancyConfig())
    controller = Controller(options, trace_sink=None)
    await controller.start()
    view = BaseModelView(base_model_id="tiny", directory="/", max_context_tokens=64, created_s=0)
    await controller.set_base_models((view,), {"tiny": SPEC})
    await controller.ensure_tenant("acme", TenantLimits())
    say("ready")
    await asyncio.gather(*(work(controller, lane) for lane in range(3)))

asyncio.run(main())
"""


def _run_and_kill(options: ControllerOptions, first: int, delay_s: float) -> list[list[str]]:
    """What the process acknowledged before it was killed ``delay_s`` after its start-up."""
    arguments = [str(options.data_dir), str(first), str(options.controller.database.url)]
    child = subprocess.Popen([sys.executable, "-c", CHILD, *arguments], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    time.sleep(delay_s)
    os.kill(child.pid, signal.SIGKILL)
    said, _ = child.communicate(timeout=30)
    # A last line without its end was cut by the kill: it may or may not have been meant.
    return [line.split() for line in said.split("\n")[:-1]]


@pytest.mark.alone
@pytest.mark.parametrize(
    ("new_database", "seed"), [("sqlite", 1), ("sqlite", 2), ("postgresql", 1)], indirect=["new_database"]
)
async def test_kill_minus_nine(make_options: Callable[..., ControllerOptions], start: Any, seed: int) -> None:
    options = make_options()
    rng = random.Random(seed)
    stored: dict[tuple[str, int], str] = {}
    maybe_deleted: set[tuple[str, int]] = set()
    for round_number in range(3):
        said = _run_and_kill(options, round_number * 10_000, rng.uniform(0, 0.6))
        for event, name, version, *digest in said:
            if event == "stored":
                stored[name, int(version)] = digest[0]
            else:
                maybe_deleted.add((name, int(version)))
        controller = await start(options)
        snapshot = await controller.snapshot(after_epoch=0, after_version=0, timeout_s=0)
        present = {(view.ref.name, view.ref.version): view for view in snapshot.adapters}
        for key, digest_text in stored.items():
            if key not in maybe_deleted:
                assert present[key].ref.digest == digest_text
        for name in {name for name, _ in present}:
            assert sum(view.current for (other, _), view in present.items() if other == name) == 1
        for view in present.values():
            info = await controller.artifact(view.ref.digest)
            content = Path(info.url).read_bytes()  # noqa: ASYNC240
            assert len(content) == view.num_bytes
            assert hashlib.sha256(content).hexdigest() == info.content_sha256
            assert json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        files = [path.name for path in (options.data_dir / "artifacts").rglob("*") if path.is_file()]
        assert all(len(name) == 64 + len(".safetensors") for name in files), "no torn file is left"
        assert list((options.data_dir / "uploads").iterdir()) == []
        await controller.create_key(TenantName("acme"), Role.MEMBER)
        await controller.stop()
    assert stored, "the child got something done before a kill"
