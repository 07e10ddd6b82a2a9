"""What a base model is, in numbers: enough to size pages, check an adapter and build the network.

Read from a Hugging Face ``config.json`` by ``model_runner``; registry, engine and planner only read the values.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from loraplex.core.ids import BaseModelId

LORA_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The seven projections of a decoder layer that may carry LoRA, in layer order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """Llama 3 frequency scaling (``rope_type: llama3``); None on ModelSpec means plain rotary."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A decoder-only base model. Sizes are element counts, not bytes."""

    base_model_id: BaseModelId
    family: str
    """One of ``llama``, ``mistral``, ``qwen2``, ``qwen3`` (SmolLM2 is ``llama``)."""
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_context_tokens: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = field(default=())

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def kv_elements_per_token(self) -> int:
        """K and V of one token over all layers."""
        return 2 * self.num_layers * self.kv_size

    def projection_shape(self, module: str) -> tuple[int, int]:
        """(in_features, out_features) of one of LORA_MODULES. KeyError for any other name."""
        return self._projection_shapes()[module]

    def _projection_shapes(self) -> Mapping[str, tuple[int, int]]:
        d, i = self.hidden_size, self.intermediate_size
        return {
            "q_proj": (d, self.q_size),
            "k_proj": (d, self.kv_size),
            "v_proj": (d, self.kv_size),
            "o_proj": (self.q_size, d),
            "gate_proj": (d, i),
            "up_proj": (d, i),
            "down_proj": (i, d),
        }
