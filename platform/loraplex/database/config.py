"""Settings of the control database."""

import msgspec


class DatabaseConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    url: str | None = None
    """Any SQLAlchemy URL; by default the SQLite file ``control.db`` in the data directory. A SQLite file
    is created with its parent directories, readable by its owner alone."""
    busy_timeout_s: float = 5.0
    """How long a SQLite statement waits for another process's lock before the call fails as Unavailable."""
