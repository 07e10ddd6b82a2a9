"""The tensors of a decoder, fused and packed, and their filling from Hugging Face names.

Owns fusion (q, k, v into one projection; gate and up into one) and the check that every tensor arrives once, in the
right shape. Does not know where tensors come from (``checkpoints``, ``random_models``, GGUF) nor what a forward pass
is. Legend: D hidden, V vocabulary, C fused q+k+v columns, J gate+up columns, H head dim.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from loraplex_kernels import pack_weight

from loraplex.core.errors import BadConfig
from loraplex.core.model import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """Projections are packed by ``loraplex_kernels.pack_weight``; norms and biases are plain vectors."""

    input_norm: torch.Tensor
    qkv: torch.Tensor
    """(C, D)."""
    qkv_bias: torch.Tensor | None
    """(C,)."""
    q_norm: torch.Tensor | None
    """(H,), Qwen3."""
    k_norm: torch.Tensor | None
    o: torch.Tensor
    post_norm: torch.Tensor
    gate_up: torch.Tensor
    """(J, D), gate rows first."""
    down: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderWeights:
    embedding: torch.Tensor
    """(V, D), dense."""
    layers: tuple[LayerWeights, ...]
    final_norm: torch.Tensor
    lm_head: torch.Tensor
    """(V, D), packed."""


@dataclass(slots=True)
class _Slot:
    """Where one named tensor goes: rows [row, row + shape[0]) of a fused buffer."""

    buffer: str
    row: int
    shape: tuple[int, ...]
    filled: bool = False


@dataclass(slots=True)
class _Layout:
    buffers: dict[str, tuple[int, ...]] = field(default_factory=dict)
    slots: dict[str, _Slot] = field(default_factory=dict)

    def add(self, buffer: str, parts: list[tuple[str, tuple[int, ...]]]) -> None:
        row = 0
        for name, shape in parts:
            self.slots[name] = _Slot(buffer=buffer, row=row, shape=shape)
            row += shape[0]
        self.buffers[buffer] = (row, *parts[0][1][1:])


def tensor_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Hugging Face name -> shape of every tensor of the model; ``lm_head.weight`` only where it is not tied."""
    return {name: slot.shape for name, slot in _layout(spec).slots.items()}


def assemble_weights(
    spec: ModelSpec,
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    dtype: torch.dtype,
    device: torch.device,
    source: str,
) -> DecoderWeights:
    """Copies each tensor into its place, cast to ``dtype`` on ``device``. ``source`` names the model in errors.

    Raises BadConfig for a missing, repeated, unknown or wrongly shaped tensor.
    """
    layout = _layout(spec)
    buffers = {name: torch.empty(shape, dtype=dtype, device=device) for name, shape in layout.buffers.items()}
    for name, tensor in tensors:
        slot = layout.slots.get(name)
        if slot is None:
            if _is_ignored(name, spec):
                continue
            raise BadConfig(f"{source}: tensor {name} is not part of a {spec.family} model")
        if tuple(tensor.shape) != slot.shape:
            raise BadConfig(f"{source}: tensor {name} is {tuple(tensor.shape)}, {slot.shape} expected")
        if slot.filled:
            raise BadConfig(f"{source}: tensor {name} occurs twice")
        buffers[slot.buffer][slot.row : slot.row + slot.shape[0]].copy_(tensor)
        slot.filled = True
    missing = [name for name, slot in layout.slots.items() if not slot.filled]
    if missing:
        raise BadConfig(f"{source}: {len(missing)} tensors are missing, the first is {missing[0]}")
    embedding = buffers.pop("embedding")
    lm_head = embedding if spec.tie_embeddings else buffers.pop("lm_head")
    return DecoderWeights(
        embedding=embedding,
        layers=tuple(_take_layer(spec, buffers, layer) for layer in range(spec.num_layers)),
        final_norm=buffers.pop("final_norm"),
        lm_head=pack_weight(lm_head),
    )


def _layout(spec: ModelSpec) -> _Layout:
    layout = _Layout()
    d = spec.hidden_size
    layout.add("embedding", [("model.embed_tokens.weight", (spec.vocab_size, d))])
    for layer in range(spec.num_layers):
        prefix = f"model.layers.{layer}"

        def weights(*modules: str, prefix: str = prefix) -> list[tuple[str, tuple[int, ...]]]:
            parts: list[tuple[str, tuple[int, ...]]] = []
            for module in modules:
                block = "mlp" if module in ("gate_proj", "up_proj", "down_proj") else "self_attn"
                in_features, out_features = spec.projection_shape(module)
                parts.append((f"{prefix}.{block}.{module}.weight", (out_features, in_features)))
            return parts

        layout.add(f"{layer}.input_norm", [(f"{prefix}.input_layernorm.weight", (d,))])
        qkv = weights("q_proj", "k_proj", "v_proj")
        layout.add(f"{layer}.qkv", qkv)
        if spec.qkv_bias:
            biases = [(name.removesuffix("weight") + "bias", shape[:1]) for name, shape in qkv]
            layout.add(f"{layer}.qkv_bias", biases)
        if spec.qk_norm:
            for which in ("q", "k"):
                layout.add(f"{layer}.{which}_norm", [(f"{prefix}.self_attn.{which}_norm.weight", (spec.head_dim,))])
        layout.add(f"{layer}.o", weights("o_proj"))
        layout.add(f"{layer}.post_norm", [(f"{prefix}.post_attention_layernorm.weight", (d,))])
        layout.add(f"{layer}.gate_up", weights("gate_proj", "up_proj"))
        layout.add(f"{layer}.down", weights("down_proj"))
    layout.add("final_norm", [("model.norm.weight", (d,))])
    if not spec.tie_embeddings:
        layout.add("lm_head", [("lm_head.weight", (spec.vocab_size, d))])
    return layout


def _is_ignored(name: str, spec: ModelSpec) -> bool:
    """Old checkpoints store the rotary table; tied ones sometimes a copy of the embedding."""
    return name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and spec.tie_embeddings)


def _take_layer(spec: ModelSpec, buffers: dict[str, torch.Tensor], layer: int) -> LayerWeights:
    """Packs and drops the buffers of one layer, so that at most one layer exists twice."""

    def take(name: str) -> torch.Tensor:
        return buffers.pop(f"{layer}.{name}")

    return LayerWeights(
        input_norm=take("input_norm"),
        qkv=pack_weight(take("qkv")),
        qkv_bias=take("qkv_bias") if spec.qkv_bias else None,
        q_norm=take("q_norm") if spec.qk_norm else None,
        k_norm=take("k_norm") if spec.qk_norm else None,
        o=pack_weight(take("o")),
        post_norm=take("post_norm"),
        gate_up=pack_weight(take("gate_up")),
        down=pack_weight(take("down")),
    )
