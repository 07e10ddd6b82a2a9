"""A controller's catalog on a database, and dumps of databases from before there were migrations."""

from pathlib import Path

from loraplex.controller.catalog import Catalog
from loraplex.controller.config import ControllerConfig, ControllerOptions
from loraplex.core.clock import SystemClock
from loraplex.core.ids import TenantName
from loraplex.database.config import DatabaseConfig
from loraplex.registry.config import RegistryConfig
from loraplex.tenancy import TenancyConfig

ACME = TenantName("acme")
OLD = Path(__file__).parent / "old"
"""Versions 1 and 2 of ``cluster``, as the program wrote them."""


def open_catalog(url: str, tmp_path: Path) -> Catalog:
    options = ControllerOptions(
        data_dir=tmp_path,
        controller=ControllerConfig(database=DatabaseConfig(url=url)),
        registry=RegistryConfig(),
        tenancy=TenancyConfig(),
    )
    return Catalog(options, SystemClock())
