"""The demo: two tenants, their keys and adapters, and ``demo.json`` that tells a newcomer (and the CLI) about them.

Idempotent: a second start keeps tenants, keys and adapters. Called by ``loraplex serve`` when the config says ``demo``.
"""

import json
import os
from pathlib import Path
from typing import Any

from loraplex.core.ids import TenantName
from loraplex.core.tenant import Role, TenantLimits
from loraplex.demo import DEMO_TENANTS
from loraplex.tenancy.keys import new_key

from loraplex_deployments.launch import RunningPlatform

ADMIN_TENANT = "admin"


def ensure_demo(platform: RunningPlatform, path: Path, base_model_id: str) -> dict[str, Any]:
    """Registers what is missing and writes ``path`` (mode 0600); returns its content."""
    old = _read(path)
    keys = {tenant["name"]: tenant["key"] for tenant in old.get("tenants", [])}
    admin_key = old.get("admin_key") or new_key()
    platform.call("ensure_tenant", ADMIN_TENANT, TenantLimits())
    platform.call("ensure_key", TenantName(ADMIN_TENANT), Role.ADMIN, admin_key)
    tenants = []
    for demo in DEMO_TENANTS:
        tenant = TenantName(demo.name)
        key = keys.get(demo.name) or new_key()
        platform.call("ensure_tenant", demo.name, TenantLimits())
        platform.call("ensure_key", tenant, Role.TENANT_ADMIN, key)
        for adapter in demo.adapters:
            platform.call("ensure_adapter", tenant, adapter.name, str(adapter.directory))
        models = [base_model_id, *(adapter.name for adapter in demo.adapters)]
        tenants.append({"name": demo.name, "key": key, "models": models})
    content = {
        "http": platform.http_url,
        "grpc": platform.grpc_address,
        "tenants": tenants,
        "admin_key": admin_key,
    }
    _write(path, content)
    return content


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
