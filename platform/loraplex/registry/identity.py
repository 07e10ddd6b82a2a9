"""The digest of an adapter: what makes two adapters the same. Pure; used at intake.

digest = HMAC-SHA256(key = the tenant's digest salt, message = canonical JSON of base model, resolved blocks and the
SHA-256 of the safetensors file). The key makes equal files of two tenants differ in digest, hence in store path, cache
key and KV: no tenant can learn from any of them that another one has the same adapter. The price is that such a file is
stored once per tenant. The blocks stand for the config: two config files that mean the same are the same adapter.
"""

import hashlib
import hmac
from collections.abc import Sequence

import msgspec

from loraplex.core.adapter import AdapterBlock
from loraplex.core.ids import BaseModelId, Digest

_FORMAT = 1
"""Grows when the meaning of the canonical form changes; digests of different formats never collide."""


def adapter_digest(
    *,
    digest_salt: str,
    base_model_id: BaseModelId,
    blocks: Sequence[AdapterBlock],
    content_sha256: str,
) -> Digest:
    """``digest_salt``: hex, of the tenant. ``blocks``: in manifest order. Scales enter exactly, as hex floats."""
    canonical = msgspec.json.encode(
        [
            _FORMAT,
            base_model_id,
            [[block.layer, block.module, block.lora_rank, block.scale.hex()] for block in blocks],
            content_sha256,
        ]
    )
    return Digest(hmac.new(bytes.fromhex(digest_salt), canonical, hashlib.sha256).hexdigest())
