"""A thousand adapters: start-up, listing and registering stay quick; snapshots share what did not change."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loraplex.controller.config import ControllerOptions
from loraplex.core.adapter import AdapterBlock, AdapterManifest
from loraplex.core.clock import SystemClock
from loraplex.core.ids import BaseModelId, Digest, TenantName
from loraplex.core.model import LORA_MODULES
from loraplex.core.tenant import TenantLimits
from loraplex.database.config import DatabaseConfig
from loraplex.database.database import Database
from loraplex.registry.intake import CheckedAdapter
from loraplex.registry.registry import Registry
from loraplex.tenancy.accounts import Accounts
from loraplex.testing.tiny_adapter import tiny_adapter

ACME = TenantName("acme")
BLOCKS = tuple(
    AdapterBlock(layer=layer, module=module, lora_rank=16, scale=2.0) for layer in range(32) for module in LORA_MODULES
)


def _fill(database_url: str, count: int) -> None:
    """In one transaction, as if it had been done over weeks."""
    registry = Registry(SystemClock())
    database = Database(DatabaseConfig(url=database_url), directory=Path())
    with database.write() as session:
        Accounts(SystemClock()).create_tenant(session, ACME, TenantLimits())
        for number in range(count):
            manifest = AdapterManifest(
                digest=Digest(f"{number:064x}"), base_model_id=BaseModelId("tiny"), blocks=BLOCKS, num_bytes=10**6
            )
            checked = CheckedAdapter(manifest=manifest, content_sha256="0" * 64)
            registry.publish(session, ACME, f"adapter-{number:04}", checked, TenantLimits())
    database.close()


async def test_a_thousand_adapters(
    make_options: Callable[..., ControllerOptions],
    start: Any,
    database_url: str,
) -> None:
    options = make_options()
    _fill(database_url, 1000)

    started = time.perf_counter()
    controller = await start(options)
    start_s = time.perf_counter() - started
    snapshot = await controller.snapshot(after_epoch=0, after_version=0, timeout_s=0)
    assert len(snapshot.adapters) == 1000

    started = time.perf_counter()
    upload_id = await controller.begin_upload(ACME, "one-more")
    for filename, data in tiny_adapter().items():
        await controller.append_upload(upload_id, filename, data)
    await controller.commit_upload(upload_id)
    register_s = time.perf_counter() - started

    started = time.perf_counter()
    assert (await controller.artifact(Digest(f"{999:064x}"))).manifest.blocks == BLOCKS
    manifest_s = time.perf_counter() - started
    await controller.stop()
    print(f"start {start_s:.3f} s, register one more {register_s:.3f} s, manifest {manifest_s:.3f} s")
    assert start_s < 1.0
    assert register_s < 0.5
    assert manifest_s < 0.1
