"""Settings of the traces: of the recorder in gateways and of the files that the controller keeps."""

import msgspec

from loraplex.core.errors import BadConfig
from loraplex.object_storage.url import check_url


class TraceConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a row of each request is kept, and how soon. A crash (``kill -9``) of gateway and controller together loses
    the rows of at most ``send_interval_s`` + ``write_interval_s`` and the time of one write; the defaults keep that
    under five seconds. A clean stop loses nothing."""

    url: str | None = None
    """A local directory or any pyarrow.fs URL (``s3://bucket/prefix``, ``gs://...``, ``file:///...``), with options as
    in ``registry.artifact_url``. None: the platform's own data directory."""

    send_interval_s: float = 1.0
    """A row waits at most this long in the gateway."""
    send_timeout_s: float = 5.0
    """A send that takes longer counts as failed and is repeated; the store recognises the repeat."""
    max_batch_rows: int = 4096
    """Rows in one message; reaching it sends at once."""
    max_unsent_rows: int = 100_000
    """While the controller is away a gateway keeps up to this many rows; then the oldest are dropped and counted."""
    retry_first_s: float = 0.1
    """Wait after the first failed send; doubles up to ``retry_max_s``."""
    retry_max_s: float = 2.0
    """Longest wait between sends."""
    close_timeout_s: float = 10.0
    """How long a stopping gateway keeps trying to send what is left."""

    write_interval_s: float = 3.0
    """Rows reach a file at most this long after they came in."""
    max_unwritten_rows: int = 200_000
    """Rows kept in memory while the disk refuses them; past it the oldest are dropped and counted."""
    rotate_bytes: int = 16 << 20
    """Small part files are merged into one trace file when together they reach this size ..."""
    rotate_age_s: float = 300.0
    """... or when the oldest of them is this old."""
    adopt_age_s: float = 600.0
    """Part files of a writer that is gone are merged by another one once they have been still for this long. Longer
    than ``rotate_age_s``, so that a living writer always comes first."""
    max_total_bytes: int = 10 << 30
    """Retention: the oldest files are deleted when all files together are larger."""

    def __post_init__(self) -> None:
        if self.url == "":
            raise BadConfig("traces.url is empty", param="url")
        check_url(self.url or "", param="traces.url")
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if name != "url" and not value > 0:
                raise BadConfig(f"traces.{name} is {value}, must be greater than 0", param=name)
        if self.adopt_age_s <= self.rotate_age_s:
            raise BadConfig(
                f"traces.adopt_age_s is {self.adopt_age_s}, must be over rotate_age_s ({self.rotate_age_s})",
                param="adopt_age_s",
            )
