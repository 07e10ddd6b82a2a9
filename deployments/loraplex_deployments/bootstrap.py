"""The first tenants and the administrator's key of a platform. Called by the launcher after the controller is up.

Idempotent: what exists stays as it is.
"""

import os
from pathlib import Path

from loraplex.config.platform import PlatformConfig
from loraplex.core.errors import BadConfig
from loraplex.core.ids import TenantName
from loraplex.core.tenant import Role, TenantLimits
from loraplex.tenancy.keys import new_key

from loraplex_deployments.launch import RunningPlatform

_ADMIN_TENANT = TenantName("admin")


def ensure_admin_key(platform: RunningPlatform, config: PlatformConfig) -> str:
    """The key in the config's admin key file, which is written (mode 0600) when it does not exist."""
    path = config.admin_key_path
    try:
        key = path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        key = new_key()
        write_private(path, key + "\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BadConfig(f"admin_key_file: {path}: {error}", param="admin_key_file") from None
    platform.call("ensure_tenant", _ADMIN_TENANT, TenantLimits())
    platform.call("ensure_key", _ADMIN_TENANT, Role.ADMIN, key)
    return key


def ensure_tenants(platform: RunningPlatform, config: PlatformConfig) -> None:
    for tenant in config.tenants:
        platform.call("ensure_tenant", tenant.name, tenant.limits)


def write_private(path: Path, text: str) -> None:
    """Replaces ``path`` atomically by a file that only its owner can read."""
    temporary = path.with_name(f".{path.name}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
