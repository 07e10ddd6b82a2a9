"""Settings of the registry: limits at the door, where artifacts lie, how long deleted ones stay, the node cache."""

import msgspec

from loraplex.object_storage.url import check_url

MIB = 1024 * 1024


class RegistryConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    artifact_url: str | None = None
    """Where checked adapters are stored: a local path or any ``pyarrow.fs`` URL (s3://, gs://, hdfs://); by default
    ``artifacts`` in the data directory. Options of S3 stand behind the path: ``s3://bucket/prefix?region=eu-central-1``,
    ``endpoint_override=http://minio:9000``, ``credentials_file=FILE``. Credentials never do: ``docs/stores.md``."""
    storage_retry_s: float = 30.0
    """How long calls of a remote artifact store are tried again while it does not answer."""
    approved_url_prefixes: tuple[str, ...] = ()
    """URLs below which ``register by URL`` may read: any tenant, unless a part of the path is ``{tenant}``, as in
    ``s3://bucket/{tenant}/``, which stands for the name of the tenant that registers. ``file:///srv/adapters`` approves
    that directory alone: symbolic links below it are not followed. Options such as ``?region=`` belong here, tenants
    cannot give any."""
    max_lora_rank: int = 256
    """Largest r that an adapter may have in any module."""
    max_adapter_bytes: int = 1024 * MIB
    """Largest safetensors file."""
    max_header_bytes: int = 8 * MIB
    """Largest safetensors header; a larger claim is refused after 8 bytes."""
    max_config_bytes: int = 64 * 1024
    """Largest adapter_config.json."""
    max_open_uploads: int = 4
    """Per tenant."""
    upload_idle_s: float = 600.0
    """An upload that got no data for so long is dropped."""
    deleted_grace_s: float = 3600.0
    """How long the file of an adapter that nothing names any more is kept for replicas that still serve it."""
    sweep_interval_s: float = 60.0
    """How often idle uploads and deleted artifacts are looked for."""
    piece_bytes: int = 4 * MIB
    """Largest piece of an artifact that is read or sent at once."""
    cache_bytes: int = 20 * 1024 * MIB
    """Size of a node's disk cache, at most; the least recently used adapters that nobody reads leave first."""
    cache_wait_s: float = 30.0
    """How long an adapter waits for room when all that is in the cache is being read."""

    def __post_init__(self) -> None:
        check_url(self.artifact_url or "", param="registry.artifact_url")
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if isinstance(value, int | float) and value <= 0:
                raise ValueError(f"{name} must be positive")
