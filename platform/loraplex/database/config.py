"""Settings of the control database."""

import msgspec


class DatabaseConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    url: str = "sqlite:///.loraplex/control.db"
    """Any SQLAlchemy URL. A SQLite file is created with its parent directories, readable by its owner alone."""
    busy_timeout_s: float = 5.0
    """How long a SQLite statement waits for another process's lock before the call fails as Unavailable."""
