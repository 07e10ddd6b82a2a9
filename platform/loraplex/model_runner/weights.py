"""The tensors of a decoder, or of a rank's part of one, fused and packed, and their filling from Hugging Face names.

Owns fusion (q, k, v into one projection; gate and up into one), the cutting of each tensor to the rank's part, and the
check that every tensor arrives once, in the right shape. Does not know where tensors come from (``checkpoints``,
``random_models``, GGUF) nor what a forward pass is.
Legend, sizes of the rank's part: D hidden, V vocabulary, C fused q+k+v columns, J gate+up columns, H head dim.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from loraplex_kernels import pack_weight

from loraplex.core.errors import BadConfig
from loraplex.core.model import ModelSpec
from loraplex.model_runner.shard import Shard

_EMBEDDING = "model.embed_tokens.weight"


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
    embedding: torch.Tensor | None
    """(whole vocabulary, D), dense; None behind the first stage."""
    layers: tuple[LayerWeights, ...]
    """Of the stage."""
    final_norm: torch.Tensor | None
    """None before the last stage, as the head."""
    lm_head: torch.Tensor | None
    """(V, D), packed."""


@dataclass(slots=True)
class _Slot:
    """Where one named tensor goes: ``part`` of it to the rows of a fused buffer from ``row`` on."""

    buffer: str
    row: int
    shape: tuple[int, ...]
    """Of the whole tensor."""
    part: tuple[slice, ...]
    filled: bool = False


@dataclass(slots=True)
class _Layout:
    buffers: dict[str, tuple[int, ...]] = field(default_factory=dict)
    slots: dict[str, _Slot] = field(default_factory=dict)

    def add(self, buffer: str, *parts: "_Part") -> None:
        """Stacks ``parts`` in one buffer."""
        row = 0
        for name, shape, part in parts:
            self.slots[name] = _Slot(buffer=buffer, row=row, shape=shape, part=part)
            row += part[0].stop - part[0].start
        self.buffers[buffer] = (row, *(columns.stop - columns.start for columns in parts[0][2][1:]))


_Part = tuple[str, tuple[int, ...], tuple[slice, ...]]
"""Name and shape of a tensor, and which part of it the rank holds."""


def tensor_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Hugging Face name -> shape of every tensor of the model; ``lm_head.weight`` only where it is not tied."""
    return {name: slot.shape for name, slot in _layout(Shard.whole(spec)).slots.items()}


def tensors_elsewhere(shard: Shard) -> frozenset[str]:
    """Names of the tensors that other stages alone hold: they need not be read."""
    return frozenset(tensor_shapes(shard.model)) - frozenset(_layout(shard).slots)


def assemble_weights(
    shard: Shard,
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    dtype: torch.dtype,
    device: torch.device,
    source: str,
) -> DecoderWeights:
    """Copies the rank's part of each tensor into its place, cast to ``dtype`` on ``device``. ``source`` names the model
    in errors. Tensors of other stages are passed over.

    Raises BadConfig for a missing, repeated, unknown or wrongly shaped tensor.
    """
    spec, layout, elsewhere = shard.model, _layout(shard), tensors_elsewhere(shard)
    buffers = {name: torch.empty(shape, dtype=dtype, device=device) for name, shape in layout.buffers.items()}
    for name, tensor in tensors:
        slot = layout.slots.get(name)
        if slot is None:
            if name in elsewhere or _is_ignored(name, spec):
                continue
            raise BadConfig(f"{source}: tensor {name} is not part of a {spec.family} model")
        if tuple(tensor.shape) != slot.shape:
            raise BadConfig(f"{source}: tensor {name} is {tuple(tensor.shape)}, {slot.shape} expected")
        if slot.filled:
            raise BadConfig(f"{source}: tensor {name} occurs twice")
        part = tensor[slot.part]
        buffers[slot.buffer][slot.row : slot.row + part.shape[0]].copy_(part)
        slot.filled = True
    missing = [name for name, slot in layout.slots.items() if not slot.filled]
    if missing:
        raise BadConfig(f"{source}: {len(missing)} tensors are missing, the first is {missing[0]}")
    embedding = buffers.pop("embedding", None)
    lm_head = buffers.pop("lm_head", None)
    if lm_head is None and shard.is_last:
        assert embedding is not None, "a tied head needs the embedding"
        lm_head = embedding[shard.vocabulary]
    return DecoderWeights(
        embedding=embedding,
        layers=tuple(_take_layer(spec, buffers, layer) for layer in shard.layers),
        final_norm=buffers.pop("final_norm", None),
        lm_head=None if lm_head is None else pack_weight(lm_head),
    )


def _layout(shard: Shard) -> _Layout:
    spec, layout = shard.model, _Layout()
    d = spec.hidden_size
    table = (spec.vocab_size, d)

    def vector(name: str, size: int) -> _Part:
        return name, (size,), (slice(0, size),)

    if shard.is_first:
        layout.add("embedding", (_EMBEDDING, table, (slice(0, spec.vocab_size), slice(0, d))))
    for layer in shard.layers:
        prefix = f"model.layers.{layer}"

        def weights(*modules: str, prefix: str = prefix) -> list[_Part]:
            parts: list[_Part] = []
            for module in modules:
                block = "mlp" if module in ("gate_proj", "up_proj", "down_proj") else "self_attn"
                in_features, out_features = spec.projection_shape(module)
                part = (shard.outputs(module), shard.inputs(module))
                parts.append((f"{prefix}.{block}.{module}.weight", (out_features, in_features), part))
            return parts

        layout.add(f"{layer}.input_norm", vector(f"{prefix}.input_layernorm.weight", d))
        qkv = weights("q_proj", "k_proj", "v_proj")
        layout.add(f"{layer}.qkv", *qkv)
        if spec.qkv_bias:
            biases = [(name.removesuffix("weight") + "bias", shape[:1], part[:1]) for name, shape, part in qkv]
            layout.add(f"{layer}.qkv_bias", *biases)
        if spec.qk_norm:
            for which in ("q", "k"):
                layout.add(f"{layer}.{which}_norm", vector(f"{prefix}.self_attn.{which}_norm.weight", spec.head_dim))
        layout.add(f"{layer}.o", *weights("o_proj"))
        layout.add(f"{layer}.post_norm", vector(f"{prefix}.post_attention_layernorm.weight", d))
        layout.add(f"{layer}.gate_up", *weights("gate_proj", "up_proj"))
        layout.add(f"{layer}.down", *weights("down_proj"))
    if shard.is_last:
        layout.add("final_norm", vector("model.norm.weight", d))
        # A tied head is a part of the embedding, which only the first stage has.
        if not (spec.tie_embeddings and shard.is_first):
            name = _EMBEDDING if spec.tie_embeddings else "lm_head.weight"
            layout.add("lm_head", (name, table, (shard.vocabulary, slice(0, d))))
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
