"""Where models come from: directories (whole, sharded, broken), names of random models, GGUF files."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from loraplex.core.errors import BadConfig
from loraplex.core.ids import BaseModelId
from loraplex.core.model import RopeScaling
from loraplex.model_runner import ExecutorConfig, build_executor, load_model_spec
from loraplex.model_runner.build import load_weights
from loraplex.model_runner.shard import Shard
from loraplex.model_runner.weights import tensor_shapes
from loraplex_kernels import linear
from safetensors.torch import load_file, save_file

BASE = BaseModelId("base")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def llama(make_base: Callable[..., Any]) -> Any:
    return make_base("llama")


@pytest.fixture
def directory(llama: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama.directory, tmp_path / "model"))


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def load(directory: Path) -> None:
    spec = load_model_spec(str(directory), BASE)
    load_weights(str(directory), Shard.whole(spec), dtype=torch.float32, device=CPU)


def test_spec_of_a_directory(directory: Path) -> None:
    spec = load_model_spec(str(directory), BASE)
    assert (spec.family, spec.hidden_size, spec.num_kv_heads, spec.head_dim) == ("llama", 64, 2, 16)
    assert spec.rope_scaling == RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=64
    )
    assert spec.eos_token_ids == (2,)


def test_keys_of_older_files_mean_the_same(directory: Path) -> None:
    spec = load_model_spec(str(directory), BASE)
    rope = json.loads((directory / "config.json").read_text())["rope_parameters"]
    edit_config(directory, rope_parameters=..., head_dim=..., rope_theta=rope.pop("rope_theta"), rope_scaling=rope)
    assert load_model_spec(str(directory), BASE) == spec
    edit_config(directory, rope_scaling=None, num_key_value_heads=...)
    assert load_model_spec(str(directory), BASE) == replace(spec, rope_scaling=None, num_kv_heads=4)


def test_generation_config_names_the_stop_tokens(directory: Path) -> None:
    (directory / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert load_model_spec(str(directory), BASE).eos_token_ids == (7, 9)


def test_sliding_windows(make_base: Callable[..., Any], tmp_path: Path) -> None:
    mistral = Path(shutil.copytree(make_base("mistral").directory, tmp_path / "mistral"))
    assert load_model_spec(str(mistral), BASE).sliding_window == 11
    edit_config(mistral, sliding_window=None)
    assert load_model_spec(str(mistral), BASE).sliding_window is None
    qwen = Path(shutil.copytree(make_base("qwen2").directory, tmp_path / "qwen"))
    edit_config(qwen, sliding_window=32)
    assert load_model_spec(str(qwen), BASE).sliding_window is None
    edit_config(qwen, use_sliding_window=True, max_window_layers=0)
    assert load_model_spec(str(qwen), BASE).sliding_window == 32
    edit_config(qwen, max_window_layers=1)
    with pytest.raises(BadConfig, match="some layers"):
        load_model_spec(str(qwen), BASE)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model_type": "mamba"}, "mamba"),
        ({"model_type": ...}, "model_type"),
        ({"hidden_size": ...}, "hidden_size"),
        ({"num_hidden_layers": "three"}, "num_hidden_layers"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "evenly"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_parameters": 3}, "rope_parameters"),
    ],
)
def test_configs_that_we_cannot_run_name_the_key(directory: Path, changes: dict[str, Any], match: str) -> None:
    edit_config(directory, **changes)
    with pytest.raises(BadConfig, match=match) as raised:
        load_model_spec(str(directory), BASE)
    assert "config.json" in raised.value.message


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b"\xff\xfe"])
def test_config_files_that_are_not_objects(directory: Path, content: bytes) -> None:
    (directory / "config.json").write_bytes(content)
    with pytest.raises(BadConfig, match=r"config\.json"):
        load_model_spec(str(directory), BASE)


def test_missing_directory() -> None:
    with pytest.raises(BadConfig, match="no/such"):
        load_model_spec("no/such", BASE)


def test_shards_give_the_same_model(llama: Any, directory: Path, make_driver: Callable[..., Any]) -> None:
    tensors = load_file(directory / "model.safetensors")
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for index in range(3):
        file = f"model-{index}.safetensors"
        save_file({name: tensors[name] for name in names[index::3]}, directory / file)
        weight_map |= dict.fromkeys(names[index::3], file)
    (directory / "model.safetensors").unlink()
    with pytest.raises(BadConfig, match="neither"):
        load(directory)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    logits = []
    for source in (llama.directory, directory):
        driver = make_driver(source)
        request = driver.open([3, 1, 4, 1, 5])
        driver.run([request], num_tokens=1)
        logits.append(driver.sampler.logits[request.slot][0])
    assert torch.equal(*logits)
    (directory / "model-1.safetensors").unlink()
    with pytest.raises(BadConfig, match="model-1"):
        load(directory)
    escaping = dict.fromkeys(names, "../model-0.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": escaping}))
    with pytest.raises(BadConfig, match="out of the directory"):
        load(directory)


def test_tensors_that_do_not_fit_are_named(directory: Path) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"

    def refused(tensors: dict[str, torch.Tensor], match: str) -> None:
        save_file(tensors, path)
        with pytest.raises(BadConfig, match=match):
            load(directory)

    refused({key: value for key, value in tensors.items() if key != name}, f"1 tensors are missing.*{name}")
    refused({**tensors, name: tensors[name][:-1].clone()}, f"{name} is .*expected")
    refused({**tensors, "model.layers.0.mlp.router.weight": torch.zeros(2)}, "router")
    save_file({**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2)}, path)
    load(directory)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BadConfig, match=r"model\.safetensors"):
        load(directory)


def test_random_models_repeat() -> None:
    spec = load_model_spec("random:tiny-mistral", BASE)
    first, second = (
        load_weights("random:tiny-mistral", Shard.whole(spec), dtype=torch.float32, device=CPU) for _ in range(2)
    )
    assert torch.equal(first.embedding, second.embedding)
    assert torch.equal(linear(torch.eye(128), first.layers[1].down), linear(torch.eye(128), second.layers[1].down))
    other = load_weights("random:tiny-llama", Shard.whole(spec), dtype=torch.float32, device=CPU)
    assert not torch.equal(first.embedding, other.embedding)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("llama3-8b", 8_030_261_248), ("llama3-1b", 1_235_814_400), ("smollm2-135m", 134_515_008)],
)
def test_random_shapes_have_the_published_sizes(name: str, parameters: int) -> None:
    shapes = tensor_shapes(load_model_spec(f"random:{name}", BASE))
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == parameters


def test_unknown_random_name_lists_the_known_ones() -> None:
    with pytest.raises(BadConfig, match="llama3-8b"):
        load_model_spec("random:nothing", BASE)


def test_gguf_file_runs_like_the_directory(llama: Any, tmp_path: Path, make_driver: Callable[..., Any]) -> None:
    spec = load_model_spec(str(llama.directory), BASE)
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_context_length(spec.max_context_tokens)
    writer.add_embedding_length(spec.hidden_size)
    writer.add_block_count(spec.num_layers)
    writer.add_feed_forward_length(spec.intermediate_size)
    writer.add_head_count(spec.num_heads)
    writer.add_head_count_kv(spec.num_kv_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    qwen = replace(spec, family="qwen2", qkv_bias=True, rope_scaling=None)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, spec.num_layers)
    generator = torch.Generator().manual_seed(0)
    for name, shape in tensor_shapes(qwen).items():
        tensor = torch.randn(shape, generator=generator) * 0.1
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert load_model_spec(str(path), BASE).family == "qwen2"
    executor = build_executor(ExecutorConfig(num_pages=4), model=str(path), base_model_id=BASE)
    assert executor.model.vocab_size == spec.vocab_size
