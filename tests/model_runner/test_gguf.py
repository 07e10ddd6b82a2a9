"""GGUF files: specs and weights against what was written, and against the loader of transformers."""

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loraplex.core.errors import BadConfig
from loraplex.core.ids import BaseModelId
from loraplex.core.model import RopeScaling
from loraplex.model_runner.gguf_weights import llama3_factors, read_gguf_spec, read_gguf_tensors
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

BASE = BaseModelId("tiny")
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, rope_theta=50000.0),
    "llama-tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES, rope_theta=1e6),
    "qwen3": Qwen3Config(**SIZES, head_dim=32, tie_word_embeddings=True),
}
MODULES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def random_model(name: str) -> Any:
    torch.manual_seed(0)
    model: torch.nn.Module = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def permute(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """As in llama.cpp's converter."""
    heads = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
    return heads.swapaxes(1, 2).reshape(weight.shape)


def gguf_tensors(model: Any, architecture: str) -> dict[str, np.ndarray]:
    source = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    tensors = {
        "token_embd.weight": source["model.embed_tokens.weight"],
        "output_norm.weight": source["model.norm.weight"],
    }
    if not model.config.tie_word_embeddings:
        tensors["output.weight"] = source["lm_head.weight"]
    for layer in range(SIZES["num_hidden_layers"]):
        for short, module in MODULES.items():
            for kind in ("weight", "bias"):
                weight = source.get(f"model.layers.{layer}.{module}.{kind}")
                if weight is None:
                    continue
                if architecture == "llama" and short in ("attn_q", "attn_k"):
                    heads = SIZES["num_attention_heads" if short == "attn_q" else "num_key_value_heads"]
                    weight = permute(weight, heads)
                tensors[f"blk.{layer}.{short}.{kind}"] = np.ascontiguousarray(weight)
    return tensors


def write_gguf(
    path: Path,
    name: str,
    quantisation: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    *,
    drop: str | None = None,
    extra: dict[str, np.ndarray] | None = None,
    keys: dict[str, int | str | float] | None = None,
) -> Any:
    """A random model as GGUF; matrices in ``quantisation``, vectors in fp32. Returns the model."""
    model = random_model(name)
    config = model.config
    architecture = name if name.startswith("qwen") else "llama"
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    if architecture == "qwen3":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    for key, value in (keys or {}).items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    for tensor_name, weight in (gguf_tensors(model, architecture) | (extra or {})).items():
        if tensor_name == drop:
            continue
        if weight.ndim == 1 or quantisation == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(tensor_name, weight)
        else:
            data = gguf.quantize(weight, quantisation)
            writer.add_tensor(tensor_name, data, raw_dtype=quantisation)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def hf_weights(model: Any) -> dict[str, torch.Tensor]:
    weights = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    return weights


@pytest.mark.parametrize("name", CONFIGS)
def test_fp32_weights_come_back_exactly(tmp_path: Path, name: str) -> None:
    path = tmp_path / "model.gguf"
    expected = hf_weights(write_gguf(path, name))
    found = dict(read_gguf_tensors(path, read_gguf_spec(path, BASE)))
    assert set(found) == set(expected)
    for key, weight in expected.items():
        assert found[key].dtype == torch.float32
        assert torch.equal(found[key], weight), key


@pytest.mark.parametrize("name", CONFIGS)
def test_spec(tmp_path: Path, name: str) -> None:
    path = tmp_path / "model.gguf"
    config = write_gguf(path, name).config
    spec = read_gguf_spec(path, BASE)
    assert spec.family == (name if name.startswith("qwen") else "llama")
    assert (spec.hidden_size, spec.intermediate_size, spec.num_layers) == (64, 128, 2)
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim) == (4, 2, 32 if name == "qwen3" else 16)
    assert (spec.vocab_size, spec.max_context_tokens, spec.rms_norm_eps) == (96, 512, 1e-5)
    assert spec.rope_theta == config.rope_parameters["rope_theta"]
    assert spec.tie_embeddings == config.tie_word_embeddings
    assert spec.qkv_bias == (name == "qwen2")
    assert spec.qk_norm == (name == "qwen3")
    assert (spec.bos_token_id, spec.eos_token_ids) == (1, (2,))
    assert spec.sliding_window is None
    assert spec.rope_scaling is None


def transformers_weights(path: Path, name: str) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, config=CONFIGS[name], dtype=torch.float32
    )
    weights: dict[str, torch.Tensor] = model.state_dict()
    return weights


QUANTISATIONS = ["F16", "BF16", "Q8_0", "Q5_1", "Q4_0", "Q4_1"]


@pytest.mark.parametrize("quantisation", QUANTISATIONS)
def test_quantised_weights_are_what_transformers_reads(tmp_path: Path, quantisation: str) -> None:
    path = tmp_path / "model.gguf"
    written = hf_weights(write_gguf(path, "llama", gguf.GGMLQuantizationType[quantisation]))
    reference = transformers_weights(path, "llama")
    for name, weight in read_gguf_tensors(path, read_gguf_spec(path, BASE)):
        assert torch.equal(weight, reference[name]), name
        assert (weight - written[name]).abs().max() < 0.2


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_other_families_are_what_transformers_reads(tmp_path: Path, name: str) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, name, gguf.GGMLQuantizationType.Q8_0)
    reference = transformers_weights(path, name)
    for key, weight in read_gguf_tensors(path, read_gguf_spec(path, BASE)):
        assert torch.equal(weight, reference[key]), key


def test_tensors_outlive_the_file(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, "llama")
    tensors = dict(read_gguf_tensors(path, read_gguf_spec(path, BASE)))
    path.unlink()
    for tensor in tensors.values():
        tensor.mul_(2.0)


def test_sliding_window_makes_a_mistral(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, "mistral", keys={"llama.attention.sliding_window": 128})
    spec = read_gguf_spec(path, BASE)
    assert (spec.family, spec.sliding_window) == ("mistral", 128)


def transformers_factors(factor: float) -> np.ndarray:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(**SIZES, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1.0 / 5e5 ** (np.arange(0, 16, 2) / 16)
    factors: np.ndarray = plain / scaled.numpy()
    return factors


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_recognised(tmp_path: Path, factor: float) -> None:
    path = tmp_path / "model.gguf"
    factors = transformers_factors(factor)
    freqs = {"rope_freqs.weight": factors.astype(np.float32)}
    write_gguf(path, "llama-tied", extra=freqs, keys={"llama.rope.freq_base": 5e5})
    spec = read_gguf_spec(path, BASE)
    assert spec.rope_scaling == RopeScaling(
        factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192
    )
    assert llama3_factors(spec.rope_scaling, 5e5, 16) == pytest.approx(factors, rel=1e-5)
    assert "model.norm.weight" in dict(read_gguf_tensors(path, spec))


def refusal(path: Path) -> str:
    with pytest.raises(BadConfig) as error:
        list(read_gguf_tensors(path, read_gguf_spec(path, BASE)))
    assert str(path) in error.value.message
    return error.value.message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"drop": "blk.1.ffn_up.weight"}, "blk.1.ffn_up.weight is missing"),
        ({"drop": "token_embd.weight"}, "token_embd.weight is missing"),
        ({"extra": {"blk.0.attn_output.bias": np.zeros(64, np.float32)}}, "blk.0.attn_output.bias"),
        ({"extra": {"blk.0.attn_norm.weight": np.zeros(65, np.float32)}}, "has shape (65,), expected (64,)"),
        ({"extra": {"rope_freqs.weight": np.full(8, 3.0, np.float32)}}, "rope_freqs.weight"),
        ({"extra": {"blk.0.attn_norm.weight": np.zeros(64, np.int32)}}, "is I32, which cannot be decoded"),
        ({"keys": {"llama.expert_count": 8}}, "llama.expert_count"),
        ({"keys": {"llama.rope.scaling.type": "yarn"}}, "yarn"),
        ({"keys": {"llama.rope.dimension_count": 8}}, "llama.rope.dimension_count"),
        ({"keys": {"llama.attention.value_length": 32}}, "llama.attention.value_length"),
        ({"keys": {"llama.attention.sliding_window": "wide"}}, "should be one int"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusals_name_the_thing(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, "llama", **changes)
    assert words in refusal(path)


def test_unknown_architecture_and_missing_key(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    for architecture, words in (("gpt2", "'gpt2' is not supported"), ("llama", "llama.embedding_length is missing")):
        writer = gguf.GGUFWriter(path, architecture)
        writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        assert words in refusal(path)


def test_missing_empty_and_foreign_files(tmp_path: Path) -> None:
    for name, content in (
        ("empty", b""),
        ("text", b"not a model" * 100),
        ("magic", b"GGUF"),
        ("zip", b"PK\x03\x04" * 9),
    ):
        (tmp_path / name).write_bytes(content)
        refusal(tmp_path / name)
    refusal(tmp_path / "absent.gguf")
    refusal(tmp_path)


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_gguf(path, "llama", gguf.GGMLQuantizationType.Q8_0)
    return path


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0.0, 0.999))
def test_truncated_file_is_refused(small_file: Path, tmp_path: Path, share: float) -> None:
    content = small_file.read_bytes()
    path = tmp_path / "short.gguf"
    path.write_bytes(content[: int(len(content) * share)])
    assert refusal(path)


def test_billions_of_layers_are_refused_at_once(small_file: Path) -> None:
    spec = replace(read_gguf_spec(small_file, BASE), num_layers=2**31)
    with pytest.raises(BadConfig, match="too few for 2147483648 layers"):
        list(read_gguf_tensors(small_file, spec))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(offset=st.integers(0, 3000), replacement=st.binary(min_size=1, max_size=8))
def test_damaged_header_never_raises_anything_else(
    small_file: Path, tmp_path: Path, offset: int, replacement: bytes
) -> None:
    content = bytearray(small_file.read_bytes())
    content[offset : offset + len(replacement)] = replacement
    path = tmp_path / "damaged.gguf"
    path.write_bytes(content)
    with contextlib.suppress(BadConfig):
        list(read_gguf_tensors(path, read_gguf_spec(path, BASE)))
