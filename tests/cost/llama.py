"""The model of the reference figures."""

from loraplex.core.ids import BaseModelId
from loraplex.core.model import ModelSpec

LLAMA_8B = ModelSpec(
    base_model_id=BaseModelId("llama3-8b"),
    family="llama",
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=128256,
    max_context_tokens=131072,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
)
