"""The demo: two tenants, their keys and adapters, and ``demo.json`` that tells a newcomer (and the CLI) about them.

Idempotent: a second start keeps tenants, keys and adapters. Called by ``loraplex serve`` when the config says ``demo``.
"""

import json
from pathlib import Path
from typing import Any

from loraplex.core.ids import TenantName
from loraplex.core.tenant import Role, TenantLimits
from loraplex.demo import DEMO_TENANTS
from loraplex.tenancy.keys import new_key

from loraplex_deployments.bootstrap import write_private
from loraplex_deployments.launch import RunningPlatform


def ensure_demo(platform: RunningPlatform, path: Path, base_model_id: str, admin_key: str) -> dict[str, Any]:
    """Registers what is missing and writes ``path`` (mode 0600); returns its content."""
    old = _read(path)
    keys = {tenant["name"]: tenant["key"] for tenant in old.get("tenants", [])}
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
    write_private(path, json.dumps(content, indent=2) + "\n")
    return content


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
