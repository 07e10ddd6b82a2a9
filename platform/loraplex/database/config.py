"""Settings of the control database."""

from pathlib import Path

import msgspec

from loraplex.core.errors import BadConfig


class DatabaseConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    url: str | None = None
    """A SQLAlchemy URL of SQLite or PostgreSQL (``postgresql://loraplex@db.example/loraplex``); by default the SQLite
    file ``control.db`` in the data directory. A SQLite file is created with its parent directories, readable by its
    owner alone. The password of PostgreSQL does not belong here: libpq takes it from ``PGPASSWORD``, from
    ``~/.pgpass``, or from the file that ``?passfile=`` names."""
    url_file: str | None = None
    """A file that holds the URL, such as a mounted secret; there it may have a password. Instead of ``url``."""
    busy_timeout_s: float = 5.0
    """How long a statement waits for another process's lock before the call fails as Unavailable."""
    connect_timeout_s: float = 5.0
    """PostgreSQL: how long a connection may take to come about, for each host of the URL; at least 2."""
    answer_timeout_s: float = 15.0
    """PostgreSQL: how long a server may be silent, beyond ``busy_timeout_s``, before the call fails as Unavailable and
    the server is taken for gone; at least 2. Then calls fail at once until it answers."""

    def __post_init__(self) -> None:
        if self.url is not None and self.url_file is not None:
            raise ValueError("url and url_file exclude each other")
        if self.busy_timeout_s <= 0 or self.connect_timeout_s < 2 or self.answer_timeout_s < 2:
            raise ValueError("busy_timeout_s must be positive, connect_timeout_s and answer_timeout_s at least 2")

    def url_text(self, directory: Path) -> str:
        """``directory`` holds the default file. Raises BadConfig when ``url_file`` cannot be read."""
        if self.url_file is None:
            return self.url or f"sqlite:///{directory / 'control.db'}"
        try:
            return Path(self.url_file).read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise BadConfig(f"database.url_file {self.url_file}: {error}", param="database.url_file") from None
