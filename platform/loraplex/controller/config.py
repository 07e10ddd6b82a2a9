"""Settings of the controller itself, and all that one controller is made from."""

from dataclasses import dataclass
from pathlib import Path

import msgspec

from loraplex.controller.fleet.config import FleetConfig
from loraplex.database.config import DatabaseConfig
from loraplex.registry.config import RegistryConfig
from loraplex.tenancy.config import TenancyConfig


class ControllerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The controller: its database, and how it carries out plans or makes them."""

    database: DatabaseConfig = msgspec.field(default_factory=DatabaseConfig)
    fleet: FleetConfig = FleetConfig()
    num_io_threads: int = 2
    """Threads that check uploads, and read and write artifacts."""
    max_long_poll_s: float = 60.0
    """A snapshot call waits at most so long, whatever it asks for."""

    def __post_init__(self) -> None:
        if self.num_io_threads < 1 or self.max_long_poll_s <= 0:
            raise ValueError("num_io_threads and max_long_poll_s must be positive")


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerOptions:
    """Composed by ``config`` from the parts of one YAML file."""

    data_dir: Path
    """Database, artifacts and uploads, unless their own settings say otherwise; uploads always."""
    controller: ControllerConfig
    registry: RegistryConfig
    tenancy: TenancyConfig
