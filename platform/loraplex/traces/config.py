"""Settings of the trace recorder (in gateways) and of the trace store (in the controller)."""

import msgspec

from loraplex.core.errors import BadConfig


class RecorderConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a gateway hands its rows on."""

    flush_interval_s: float = 1.0
    """A row waits at most this long before it is sent. Part of what a crash of the gateway loses."""
    max_batch_rows: int = 4096
    """Rows in one message; reaching it sends at once."""
    max_buffered_rows: int = 100_000
    """While the controller is away rows wait up to this many; then the oldest are dropped and counted."""
    retry_first_s: float = 0.1
    """Wait after the first failed send; doubles up to ``retry_max_s``."""
    retry_max_s: float = 2.0
    send_timeout_s: float = 5.0
    """A send that takes longer counts as failed and is repeated; the store recognises the repeat."""
    close_timeout_s: float = 10.0
    """How long ``close`` keeps trying to send what is left."""

    def __post_init__(self) -> None:
        _require_positive(
            self,
            "flush_interval_s",
            "max_batch_rows",
            "max_buffered_rows",
            "retry_first_s",
            "retry_max_s",
            "send_timeout_s",
            "close_timeout_s",
        )


class TraceStoreConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where and how trace files are kept."""

    url: str = ".loraplex/traces"
    """A local directory or any pyarrow.fs URL (``s3://bucket/prefix``, ``gs://...``, ``file:///...``)."""
    flush_interval_s: float = 3.0
    """Rows reach a file at most this long after they came in. With the recorder's interval this bounds what a
    ``kill -9`` loses; the default leaves a second of the promised five for slow disks."""
    max_buffered_rows: int = 200_000
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
        if not self.url:
            raise BadConfig("traces.url is empty", param="url")
        _require_positive(
            self,
            "flush_interval_s",
            "max_buffered_rows",
            "rotate_bytes",
            "rotate_age_s",
            "adopt_age_s",
            "max_total_bytes",
        )
        if self.adopt_age_s <= self.rotate_age_s:
            raise BadConfig(
                f"TraceStoreConfig.adopt_age_s is {self.adopt_age_s}, must be over rotate_age_s ({self.rotate_age_s})",
                param="adopt_age_s",
            )


def _require_positive(config: msgspec.Struct, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not value > 0:
            raise BadConfig(f"{type(config).__name__}.{name} is {value}, must be greater than 0", param=name)
