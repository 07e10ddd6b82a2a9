"""Base models in GGUF files: their ModelSpec, and their tensors under Hugging Face names.

Owns the mapping of names and the undoing of llama's rotary permutation. Does not know the executor or where tensors
go. Called by the executor's weight loading and by the demo base conversion. Tokenizers in GGUF files are not read here.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from loraplex.core.errors import BadConfig
from loraplex.core.ids import BaseModelId
from loraplex.core.model import ModelSpec, RopeScaling

_FAMILIES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""general.architecture -> ModelSpec.family. Files of Mistral models call themselves llama."""

_PERMUTED = ("llama",)
"""Architectures whose q and k rows the converter reorders from half-split to interleaved rotary pairs."""

_IGNORED_TENSORS = ("rope_freqs.weight",)

_REQUIRED: Any = object()
"""Marks a key without default."""


class _BoundedReader(gguf.GGUFReader):  # type: ignore[misc]  # gguf is untyped for mypy here
    """GGUFReader that refuses to read past the end of the file, where the original returns short arrays.

    Reads through a plain array: slicing ``np.memmap`` 300,000 times, as a header with a tokenizer needs, takes seconds.
    """

    _bytes: np.ndarray[Any, np.dtype[np.uint8]] | None = None

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        if self._bytes is None:
            self._bytes = self.data.view(np.ndarray)
        if self.byte_order != "I":
            raise ValueError("its byte order is not this machine's")
        end = int(offset) + np.dtype(dtype).itemsize * int(count)
        if end > len(self._bytes):
            raise ValueError(f"the file ends at byte {len(self._bytes)} but its header needs {end}")
        return self._bytes[offset:end].view(dtype)


def open_gguf(path: Path | str) -> Any:
    """A ``gguf.GGUFReader`` over the memory-mapped file. BadConfig when it is missing, torn or not GGUF."""
    try:
        return _BoundedReader(path)
    except (OSError, ValueError, KeyError, IndexError, OverflowError, MemoryError) as error:
        raise BadConfig(f"{path}: not a readable GGUF file: {error}") from error


def read_gguf_spec(path: Path | str, base_model_id: BaseModelId) -> ModelSpec:
    """Shapes and constants from the header alone. BadConfig names the file and the key that is missing or wrong."""
    return _Header(path, open_gguf(path)).spec(base_model_id)


def read_gguf_tensors(path: Path | str, spec: ModelSpec) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight of ``spec``, dequantised to fp32, one at a time, (out_features, in_features) as in Hugging Face.

    All names and shapes are checked before the first tensor is yielded. BadConfig names the file and the tensor that is
    missing, of the wrong shape, unknown, or of a quantisation that ``gguf`` cannot decode.
    """
    reader = open_gguf(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if spec.num_layers > len(tensors):
        # Before names are made for each: a damaged header may say billions.
        raise BadConfig(f"{path}: {len(tensors)} tensors are too few for {spec.num_layers} layers")
    expected = _expected_tensors(spec)
    for name, (_, shape) in expected.items():
        if name not in tensors:
            raise BadConfig(f"{path}: tensor {name} is missing")
        found = _shape(tensors[name])
        if found != shape:
            raise BadConfig(f"{path}: tensor {name} has shape {found}, expected {shape}")
    unknown = sorted(set(tensors) - set(expected) - set(_IGNORED_TENSORS))
    if unknown:
        raise BadConfig(f"{path}: tensor {unknown[0]} does not belong to a {spec.family} model")
    architecture = _Header(path, reader).architecture
    for name, (hf_name, shape) in expected.items():
        weight = _dequantise(path, tensors[name]).reshape(shape)
        if architecture in _PERMUTED and ".attn_q." in name:
            weight = _undo_permutation(weight, spec.num_heads)
        elif architecture in _PERMUTED and ".attn_k." in name:
            weight = _undo_permutation(weight, spec.num_kv_heads)
        yield hf_name, torch.from_numpy(weight)


class _Header:
    """Typed look-ups in the key-value part of one file."""

    def __init__(self, path: Path | str, reader: Any) -> None:
        self._path = path
        self._reader = reader
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        architecture = self._value("general.architecture", str)
        if architecture not in _FAMILIES:
            raise BadConfig(f"{path}: architecture {architecture!r} is not supported ({', '.join(_FAMILIES)} are)")
        self.architecture: str = architecture

    def spec(self, base_model_id: BaseModelId) -> ModelSpec:
        hidden_size = self._int("embedding_length")
        num_heads = self._int("attention.head_count")
        if num_heads < 1:
            raise BadConfig(f"{self._path}: {self.architecture}.attention.head_count is {num_heads}")
        head_dim = self._int("attention.key_length", hidden_size // num_heads)
        self._refuse_unsupported(head_dim)
        window = self._int("attention.sliding_window", 0)
        eos = self._value("tokenizer.ggml.eos_token_id", int, None)
        return ModelSpec(
            base_model_id=base_model_id,
            # A llama with a sliding window is what a Mistral is.
            family="mistral" if window and self.architecture == "llama" else _FAMILIES[self.architecture],
            hidden_size=hidden_size,
            intermediate_size=self._int("feed_forward_length"),
            num_layers=self._int("block_count"),
            num_heads=num_heads,
            num_kv_heads=self._int("attention.head_count_kv", num_heads),
            head_dim=head_dim,
            vocab_size=self._vocab_size(),
            max_context_tokens=self._int("context_length"),
            rms_norm_eps=_short_float(self._float("attention.layer_norm_rms_epsilon")),
            rope_theta=_short_float(self._float("rope.freq_base", 10000.0)),
            rope_scaling=self._rope_scaling(head_dim),
            tie_embeddings="output.weight" not in self._tensors,
            qkv_bias="blk.0.attn_q.bias" in self._tensors,
            qk_norm="blk.0.attn_q_norm.weight" in self._tensors,
            sliding_window=window or None,
            bos_token_id=self._value("tokenizer.ggml.bos_token_id", int, None),
            eos_token_ids=() if eos is None else (eos,),
        )

    def _refuse_unsupported(self, head_dim: int) -> None:
        prefix = self.architecture
        if self._int("expert_count", 0) > 0:
            raise BadConfig(f"{self._path}: mixture-of-experts models are not supported ({prefix}.expert_count)")
        rotary = self._int("rope.dimension_count", head_dim)
        if rotary != head_dim:
            raise BadConfig(f"{self._path}: {prefix}.rope.dimension_count {rotary} differs from head size {head_dim}")
        value_length = self._int("attention.value_length", head_dim)
        if value_length != head_dim:
            raise BadConfig(f"{self._path}: {prefix}.attention.value_length {value_length} differs from {head_dim}")
        scaling = self._value(f"{prefix}.rope.scaling.type", str, "none")
        if scaling != "none":
            raise BadConfig(f"{self._path}: {prefix}.rope.scaling.type {scaling!r} is not supported")

    def _vocab_size(self) -> int:
        embedding = self._tensors.get("token_embd.weight")
        if embedding is None:
            raise BadConfig(f"{self._path}: tensor token_embd.weight is missing")
        return _shape(embedding)[0]

    def _rope_scaling(self, head_dim: int) -> RopeScaling | None:
        """Llama 3.x files store the resulting factor of each frequency only; the parameters are the published ones
        (low 1, high 4, 8192 positions) with the largest factor, accepted when they reproduce the stored factors."""
        tensor = self._tensors.get("rope_freqs.weight")
        if tensor is None:
            return None
        stored = _dequantise(self._path, tensor).reshape(-1).astype(np.float64)
        theta = self._float("rope.freq_base", 10000.0)
        scaling = RopeScaling(
            factor=float(stored.max()),
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_positions=8192,
        )
        expected = llama3_factors(scaling, theta, head_dim)
        if stored.shape != expected.shape or not np.allclose(stored, expected, rtol=1e-3):
            raise BadConfig(f"{self._path}: the factors in rope_freqs.weight are not those of Llama 3 scaling")
        return scaling

    def _int(self, key: str, default: int | None = None) -> int:
        value: int = self._value(f"{self.architecture}.{key}", int, _REQUIRED if default is None else default)
        return value

    def _float(self, key: str, default: float | None = None) -> float:
        return float(self._value(f"{self.architecture}.{key}", float, _REQUIRED if default is None else default))

    def _value(self, key: str, kind: type, default: Any = _REQUIRED) -> Any:
        field = self._reader.get_field(key)
        if field is None:
            if default is _REQUIRED:
                raise BadConfig(f"{self._path}: key {key} is missing")
            return default
        try:
            value = field.contents()
        except (ValueError, IndexError) as error:
            raise BadConfig(f"{self._path}: key {key} is unreadable: {error}") from error
        if type(value) is not kind:
            raise BadConfig(f"{self._path}: key {key} should be one {kind.__name__}, got {type(value).__name__}")
        return value


def llama3_factors(scaling: RopeScaling, rope_theta: float, head_dim: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """What each rotary frequency is divided by under Llama 3 scaling: (head_dim / 2) in 1 .. factor."""
    wavelengths = 2 * np.pi * rope_theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    turns = scaling.original_max_positions / wavelengths
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = np.clip(smooth, 0.0, 1.0)
    factors: np.ndarray[Any, np.dtype[np.float64]] = 1.0 / ((1.0 - smooth) / scaling.factor + smooth)
    return factors


def _expected_tensors(spec: ModelSpec) -> dict[str, tuple[str, tuple[int, ...]]]:
    """GGUF name -> (Hugging Face name, shape), in the order of the layers."""
    hidden = spec.hidden_size
    expected: dict[str, tuple[str, tuple[int, ...]]] = {
        "token_embd.weight": ("model.embed_tokens.weight", (spec.vocab_size, hidden)),
    }
    modules = {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    for layer in range(spec.num_layers):
        source, target = f"blk.{layer}", f"model.layers.{layer}"
        expected[f"{source}.attn_norm.weight"] = (f"{target}.input_layernorm.weight", (hidden,))
        expected[f"{source}.ffn_norm.weight"] = (f"{target}.post_attention_layernorm.weight", (hidden,))
        for name, module in modules.items():
            in_features, out_features = spec.projection_shape(module.split(".")[1])
            expected[f"{source}.{name}.weight"] = (f"{target}.{module}.weight", (out_features, in_features))
            if spec.qkv_bias and name in ("attn_q", "attn_k", "attn_v"):
                expected[f"{source}.{name}.bias"] = (f"{target}.{module}.bias", (out_features,))
        if spec.qk_norm:
            for letter in ("q", "k"):
                norm = f"{target}.self_attn.{letter}_norm.weight"
                expected[f"{source}.attn_{letter}_norm.weight"] = (norm, (spec.head_dim,))
    expected["output_norm.weight"] = ("model.norm.weight", (hidden,))
    if not spec.tie_embeddings:
        expected["output.weight"] = ("lm_head.weight", (spec.vocab_size, hidden))
    return expected


def _shape(tensor: Any) -> tuple[int, ...]:
    """Outermost dimension first; the file stores it last."""
    return tuple(int(size) for size in reversed(tensor.shape))


def _dequantise(path: Path | str, tensor: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
    try:
        weights: np.ndarray[Any, np.dtype[np.float32]] = gguf.dequantize(tensor.data, tensor.tensor_type)
    except (NotImplementedError, ValueError) as error:
        kind = tensor.tensor_type.name
        raise BadConfig(f"{path}: tensor {tensor.name} is {kind}, which cannot be decoded: {error}") from error
    # A copy where the file itself holds fp32: tensors must not write to, or outlive, the mapped file.
    return weights.astype(np.float32, copy=not weights.flags.writeable)


def _undo_permutation(
    weight: np.ndarray[Any, np.dtype[np.float32]], num_heads: int
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Rows of each head from interleaved pairs (0, h, 1, h + 1, ...) back to two halves; biases alike."""
    pairs = weight.reshape(num_heads, weight.shape[0] // num_heads // 2, 2, *weight.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(weight.shape))


def _short_float(value: float) -> float:
    """The shortest decimal that is the same fp32 number: the file's 9.999999747378752e-06 is 1e-05."""
    return float(str(np.float32(value)))
