"""What others reach on the loads of ``cases``, as a file says it: published or measured elsewhere. Pure data.

Read by ``pictures``.
"""

from pathlib import Path

import msgspec

from loraplex.core.errors import BadConfig


class PeerRow(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    case: str
    """A name of ``loraplex.bench.cases``."""
    output_tokens_per_s: float | None = None
    tpot_ms: float | None = None


class Peer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str
    source: str
    """In words: where the figures come from."""
    rows: tuple[PeerRow, ...]
    single_ttft_ms: dict[str, float] = {}
    """Of a lone request of 256 tokens: ``base``, ``warm`` and ``cold`` adapter."""


class PeerFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    work: str
    """That all rows are of."""
    peers: tuple[Peer, ...]


def read_peers(path: Path) -> PeerFile:
    """Raises BadConfig naming the file and the field."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=PeerFile)
    except (OSError, msgspec.DecodeError) as error:
        raise BadConfig(f"{path}: not a file of peers: {error}") from error
