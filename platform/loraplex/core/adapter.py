"""What an adapter is to every part of the system. Identity is the digest; a name is only an alias to it."""

from dataclasses import dataclass

from loraplex.core.ids import BaseModelId, Digest, TenantName


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterRef:
    """One immutable version of one tenant's adapter. ``digest`` keys KV pages, caches, routing and metrics."""

    tenant: TenantName
    name: str
    version: int
    digest: Digest


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterBlock:
    """The LoRA of one projection of one layer.

    Tensors: A is (lora_rank, in_features), B is (out_features, lora_rank), both as stored by PEFT.
    ``scale`` is alpha / r, or alpha / sqrt(r) for rsLoRA, after rank and alpha patterns; it is folded into B at load.
    """

    layer: int
    module: str
    lora_rank: int
    scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterManifest:
    """All that can be said of an adapter without reading its tensors. Made once, at intake."""

    digest: Digest
    base_model_id: BaseModelId
    blocks: tuple[AdapterBlock, ...]
    """Sorted by (layer, order in LORA_MODULES); a missing pair means that the projection is untouched."""
    num_bytes: int
    """Size of the stored safetensors file."""

    @property
    def max_lora_rank(self) -> int:
        return max((block.lora_rank for block in self.blocks), default=0)
