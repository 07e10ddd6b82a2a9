"""Strict intake: what is accepted becomes a complete manifest, everything else a BadAdapter that names the thing."""

import hashlib
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loraplex.core.errors import BadAdapter
from loraplex.core.ids import BaseModelId
from loraplex.core.model import LORA_MODULES, ModelSpec
from loraplex.registry.config import RegistryConfig
from loraplex.registry.intake import CheckedAdapter, check_adapter

TINY = ModelSpec(
    base_model_id=BaseModelId("tiny"),
    family="llama",
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    vocab_size=32,
    max_context_tokens=64,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
)
SALT = "00" * 32
PREFIX = "base_model.model.model.layers"
Q_A = f"{PREFIX}.0.self_attn.q_proj.lora_A.weight"

Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]


def lora_config(**changes: Any) -> dict[str, Any]:
    """As peft 0.21 writes it, for the fields that matter; a change to ``...`` removes the key."""
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiny",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "lora_bias": False,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "layers_to_transform": None,
        "fan_in_fan_out": False,
        "megatron_core": "megatron.core",
        "qalora_group_size": 16,
        "peft_version": "0.21.2",
    }
    config.update(changes)
    return {key: value for key, value in config.items() if value is not ...}


def lora_tensors(config: dict[str, Any], *, spec: ModelSpec = TINY, dtype: str = "F32", seed: int = 0) -> Tensors:
    """Right tensors for ``config``; the rank may differ by a rank_pattern of plain module names."""
    rng = np.random.default_rng(seed)
    tensors: Tensors = {}
    for layer in range(spec.num_layers):
        for module in config["target_modules"]:
            parent = "self_attn" if LORA_MODULES.index(module) < 4 else "mlp"
            rank = config["rank_pattern"].get(module, config["r"])
            in_features, out_features = spec.projection_shape(module)
            for part, shape in (("A", (rank, in_features)), ("B", (out_features, rank))):
                values = rng.normal(size=shape).astype("<f4")
                data = {
                    "F32": values,
                    "F16": values.astype("<f2"),
                    "BF16": (values.view("<u4") >> 16).astype("<u2"),
                }[dtype]
                name = f"{PREFIX}.{layer}.{parent}.{module}.lora_{part}.weight"
                tensors[name] = (dtype, shape, data.tobytes())
    return tensors


def safetensors_bytes(tensors: Tensors) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + len(data)]}
        position += len(data)
    return with_header(json.dumps(header).encode(), b"".join(data for _, _, data in tensors.values()))


def with_header(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def check(
    directory: Path,
    config: dict[str, Any] | bytes,
    tensors: Tensors | bytes,
    *,
    spec: ModelSpec = TINY,
    salt: str = SALT,
    limits: RegistryConfig | None = None,
) -> CheckedAdapter:
    directory.mkdir(exist_ok=True)
    config_bytes = config if isinstance(config, bytes) else json.dumps(config).encode()
    (directory / "adapter_config.json").write_bytes(config_bytes)
    content = tensors if isinstance(tensors, bytes) else safetensors_bytes(tensors)
    (directory / "adapter_model.safetensors").write_bytes(content)
    bases = {spec.base_model_id: spec}
    return check_adapter(directory, bases=bases, digest_salt=salt, config=limits or RegistryConfig())


def refusal(directory: Path, config: dict[str, Any] | bytes, tensors: Tensors | bytes, **more: Any) -> str:
    with pytest.raises(BadAdapter) as caught:
        check(directory, config, tensors, **more)
    assert caught.value.param in ("adapter_config.json", "adapter_model.safetensors")
    assert len(caught.value.message) < 500
    return caught.value.message


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_a_good_adapter_becomes_a_manifest(tmp_path: Path, dtype: str) -> None:
    config = lora_config(target_modules=list(reversed(LORA_MODULES)))
    content = safetensors_bytes(lora_tensors(config, dtype=dtype))
    checked = check(tmp_path, config, content)
    manifest = checked.manifest
    assert [(block.layer, block.module) for block in manifest.blocks] == [(n, m) for n in (0, 1) for m in LORA_MODULES]
    assert {(block.lora_rank, block.scale) for block in manifest.blocks} == {(4, 2.0)}
    assert manifest.num_bytes == len(content)
    assert manifest.max_lora_rank == 4
    assert checked.content_sha256 == hashlib.sha256(content).hexdigest()


def test_patterns_and_rslora(tmp_path: Path) -> None:
    config = lora_config(rank_pattern={"v_proj": 2}, alpha_pattern={"^model.layers.1.self_attn.q_proj$": 4})
    blocks = check(tmp_path, config, lora_tensors(config)).manifest.blocks
    assert [(block.layer, block.module, block.lora_rank, block.scale) for block in blocks] == [
        (0, "q_proj", 4, 2.0),
        (0, "v_proj", 2, 4.0),
        (1, "q_proj", 4, 1.0),
        (1, "v_proj", 2, 4.0),
    ]
    config["use_rslora"] = True
    blocks = check(tmp_path, config, lora_tensors(config)).manifest.blocks
    assert [block.scale for block in blocks] == [4.0, 8 / math.sqrt(2), 2.0, 8 / math.sqrt(2)]


def test_only_some_layers(tmp_path: Path) -> None:
    config = lora_config(layers_to_transform=[1])
    tensors = lora_tensors(config)
    only_second = {name: entry for name, entry in tensors.items() if ".layers.1." in name}
    assert {block.layer for block in check(tmp_path, config, only_second).manifest.blocks} == {1}
    assert "not one that" in refusal(tmp_path, config, tensors)
    assert "has 2 layers" in refusal(tmp_path, lora_config(layers_to_transform=[2]), tensors)


def test_dotted_targets_as_peft_writes_them_for_all_linear(tmp_path: Path) -> None:
    tensors = lora_tensors(lora_config())
    both = [f"model.layers.{layer}.self_attn.{module}" for layer in (0, 1) for module in ("q_proj", "v_proj")]
    digest = check(tmp_path, lora_config(), tensors).manifest.digest
    assert check(tmp_path, lora_config(target_modules=both), tensors).manifest.digest == digest
    assert (
        check(tmp_path, lora_config(target_modules=["self_attn.q_proj", "v_proj"]), tensors).manifest.digest == digest
    )
    assert "not one that" in refusal(tmp_path, lora_config(target_modules=both[:3]), tensors)
    for target in ("attn.q_proj", "model.layers.7.self_attn.q_proj"):
        assert "match no module" in refusal(tmp_path, lora_config(target_modules=[target]), with_header(b"{}", b""))


def test_the_digest_is_of_content_meaning_base_and_tenant(tmp_path: Path) -> None:
    config = lora_config()
    tensors = lora_tensors(config)
    digest = check(tmp_path, config, tensors).manifest.digest
    same = lora_config(peft_version="0.20", lora_alpha=8.0, target_modules=["v_proj", "q_proj"], revision="main")
    assert check(tmp_path, same, tensors).manifest.digest == digest
    assert check(tmp_path, lora_config(lora_alpha=9), tensors).manifest.digest != digest
    assert check(tmp_path, config, lora_tensors(config, seed=1)).manifest.digest != digest
    assert check(tmp_path, config, tensors, salt="01" * 32).manifest.digest != digest
    other = replace(TINY, base_model_id=BaseModelId("tiny-chat"))
    assert check(tmp_path, config, tensors, spec=other).manifest.digest != digest


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"peft_type": ...}, "peft_type None"),
        ({"task_type": "SEQ_CLS"}, "task_type 'SEQ_CLS'"),
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias 'all'"),
        ({"lora_bias": True}, "lora_bias"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"use_qalora": True}, "QALoRA"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"exclude_modules": ["q_proj"]}, "exclude_modules"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
        ({"use_brand_new_lora": True}, "'use_brand_new_lora' is not known"),
        ({"target_modules": "all-linear"}, "'all-linear' is a pattern"),
        ({"target_modules": ".*_proj"}, "'.*_proj' is a pattern"),
        ({"target_modules": ["q_proj", "lm_head"]}, "'lm_head' is not supported"),
        ({"target_modules": []}, "target_modules must be a list"),
        ({"target_modules": None}, "target_modules must be a list"),
        ({"r": 10_000}, "r is 10000; ranks from 1 to 256"),
        ({"r": 0}, "r is 0"),
        ({"r": True}, "r must be an integer"),
        ({"r": "8"}, "r must be an integer"),
        ({"r": ...}, "r must be an integer"),
        ({"rank_pattern": {"q_proj": 257}}, "rank_pattern['q_proj'] is 257"),
        ({"rank_pattern": {".*q_proj": 8}}, "regular expression"),
        ({"rank_pattern": {"(a+)+b": 8}}, "regular expression"),
        ({"rank_pattern": [1]}, "rank_pattern must be an object"),
        ({"lora_alpha": 0}, "lora_alpha must be finite and greater than 0"),
        ({"lora_alpha": -1}, "lora_alpha"),
        ({"lora_alpha": 10**400}, "lora_alpha"),
        ({"lora_alpha": "16"}, "lora_alpha must be a number"),
        ({"lora_alpha": 1e9}, "scale"),
        ({"alpha_pattern": {"q_proj": 0}}, "alpha_pattern['q_proj']"),
        ({"use_rslora": "yes"}, "use_rslora must be true or false"),
        ({"layers_to_transform": [-1]}, "layers_to_transform"),
        ({"layers_pattern": "h", "layers_to_transform": [0]}, "layers_pattern"),
        ({"base_model_name_or_path": 5}, "base_model_name_or_path"),
    ],
)
def test_unsupported_options_are_named(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    assert named in refusal(tmp_path, lora_config(**changes), lora_tensors(lora_config()))


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b"[1]", "not a JSON object"),
        (b'{"r": NaN}', "NaN is not a JSON number"),
        (b'{"lora_alpha": 1e400}', "peft_type"),
        (b'{"r": 1, "r": 2}', "'r' appears twice"),
        (b"[" * 60_000, "nested too deeply"),
        (b'{"x": ' + b"9" * 5000 + b"}", "not JSON"),
        (b" " * 70_000, "more than the allowed 65536 bytes"),
    ],
)
def test_broken_config_files(tmp_path: Path, config: bytes, named: str) -> None:
    assert named in refusal(tmp_path, config, lora_tensors(lora_config()))


def test_missing_files(tmp_path: Path) -> None:
    directory = tmp_path / "adapter"
    check(directory, lora_config(), lora_tensors(lora_config()))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (directory / name).unlink()
        with pytest.raises(BadAdapter, match=rf"{name}: the file is missing"):
            check_adapter(directory, bases={TINY.base_model_id: TINY}, digest_salt=SALT, config=RegistryConfig())


def test_wrong_base_is_told_by_shape_and_by_name(tmp_path: Path) -> None:
    wide = replace(TINY, hidden_size=32, head_dim=8)
    message = refusal(tmp_path, lora_config(), lora_tensors(lora_config(), spec=wide))
    assert "has shape [4, 32], but base model 'tiny' with rank 4 needs [4, 16]: wrong base model" in message
    deep = replace(TINY, num_layers=3)
    assert "layers.2.self_attn" in refusal(tmp_path, lora_config(), lora_tensors(lora_config(), spec=deep))

    (tmp_path / "adapter_config.json").write_text(json.dumps(lora_config(base_model_name_or_path="org/Tiny-B")))
    (tmp_path / "adapter_model.safetensors").write_bytes(safetensors_bytes(lora_tensors(lora_config())))
    bases = {BaseModelId(name): replace(TINY, base_model_id=BaseModelId(name)) for name in ("tiny-a", "tiny-b")}
    checked = check_adapter(tmp_path, bases=bases, digest_salt=SALT, config=RegistryConfig())
    assert checked.manifest.base_model_id == "tiny-b"
    with pytest.raises(BadAdapter, match="no base model is served"):
        check_adapter(tmp_path, bases={}, digest_salt=SALT, config=RegistryConfig())
    bases.pop(BaseModelId("tiny-b"))
    bases[BaseModelId("tiny-c")] = replace(TINY, base_model_id=BaseModelId("tiny-c"))
    with pytest.raises(BadAdapter, match="'org/Tiny-B' names none of the served base models: tiny-a, tiny-c"):
        check_adapter(tmp_path, bases=bases, digest_salt=SALT, config=RegistryConfig())


@pytest.mark.parametrize(
    ("name", "named"),
    [
        (f"{PREFIX}.0.self_attn.q_proj.lora_magnitude_vector", "DoRA"),
        (f"{PREFIX}.0.self_attn.q_proj.lora_B.bias", "bias is not supported"),
        ("base_model.model.lm_head.modules_to_save.weight", "modules_to_save"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", "LoRA on embeddings"),
        (f"{PREFIX}.0.self_attn.k_proj.lora_A.weight", "not one that adapter_config.json and the base model call for"),
        (f"{PREFIX}.2.self_attn.q_proj.lora_A.weight", "not one that"),
        (f"{PREFIX}.00.self_attn.q_proj.lora_A.weight", "not one that"),
        ("x" * 10_000, "not one that"),
    ],
)
def test_extra_tensors_are_named(tmp_path: Path, name: str, named: str) -> None:
    tensors = lora_tensors(lora_config()) | {name: ("F32", (1,), b"\0\0\0\0")}
    assert named in refusal(tmp_path, lora_config(), tensors)


@pytest.mark.parametrize("part", ["A", "B"])
def test_half_a_pair_is_missing(tmp_path: Path, part: str) -> None:
    tensors = lora_tensors(lora_config())
    name = f"{PREFIX}.1.self_attn.v_proj.lora_{part}.weight"
    del tensors[name]
    assert f"{name!r} is missing" in refusal(tmp_path, lora_config(), tensors)


@pytest.mark.parametrize(
    ("dtype", "pattern"),
    [
        ("F32", b"\x00\x00\xc0\x7f"),
        ("F32", b"\x00\x00\x80\xff"),
        ("F16", b"\x00\x7e"),
        ("F16", b"\x00\xfc"),
        ("BF16", b"\xc0\x7f"),
        ("BF16", b"\x80\xff"),
    ],
)
@pytest.mark.parametrize("last", [False, True])
def test_nan_and_infinity_are_found_in_every_dtype(tmp_path: Path, dtype: str, pattern: bytes, last: bool) -> None:
    tensors = lora_tensors(lora_config(), dtype=dtype)
    name = list(tensors)[-1 if last else 0]
    kind, shape, data = tensors[name]
    size = len(pattern)
    tensors[name] = (kind, shape, data[:-size] + pattern if last else pattern + data[size:])
    # Small pieces: the check must not depend on where a piece ends.
    message = refusal(tmp_path, lora_config(), tensors, limits=RegistryConfig(piece_bytes=12))
    assert f"{name!r} holds NaN or infinity" in message


def _edited(change: Any) -> bytes:
    tensors = lora_tensors(lora_config())
    content = safetensors_bytes(tensors)
    header_end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:header_end])
    change(header)
    return with_header(json.dumps(header).encode(), content[header_end:])


def _set(**fields: Any) -> Any:
    return lambda header: header[Q_A].update(fields)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "0 bytes are too few"),
        (b"\x10", "1 bytes are too few"),
        ((10 * 2**30).to_bytes(8, "little"), "claims 10737418240 bytes"),
        (b"\xff" * 100, "claims"),
        ((1000).to_bytes(8, "little") + b"{}", "truncated?"),
        (b"PK\x03\x04" + b"\0" * 100, "pickle or a zip"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j", "pickle or a zip"),
        (with_header(b"{}", b""), "is missing"),
        (with_header(b"{}", b"1234"), "4 bytes follow"),
        (with_header(b"nonsense", b""), "not JSON"),
        (with_header(b"[]", b""), "not a JSON object"),
        (with_header(b'{"a":{},"a":{}}', b""), "appears twice"),
        (with_header(b'{"a": 1}', b""), "must have exactly"),
        (_edited(_set(dtype="I8")), "dtype 'I8'"),
        (_edited(_set(dtype="F64")), "dtype 'F64'"),
        (_edited(_set(shape=[2, 2])), "another number"),
        (_edited(_set(shape=[-4, -16])), "no list of sizes"),
        (_edited(_set(shape=[16, 4])), "has shape [16, 4]"),
        (_edited(_set(shape=[1] * 9)), "no list of sizes"),
        (_edited(_set(data_offsets=[0])), "no byte range"),
        (_edited(_set(data_offsets=[256, 0])), "no byte range"),
        (_edited(_set(data_offsets=[4, 260])), "gap before it"),
        (_edited(_set(data_offsets=[256, 512])), "gap"),
        (_edited(_set(extra=1)), "must have exactly"),
        (_edited(lambda header: header.update(__metadata__={"a": 1})), "__metadata__"),
        (safetensors_bytes(lora_tensors(lora_config()))[:-1], "truncated?"),
        (safetensors_bytes(lora_tensors(lora_config())) + b"\0", "1 bytes follow the last tensor"),
    ],
)
def test_broken_tensor_files(tmp_path: Path, content: bytes, named: str) -> None:
    assert named in refusal(tmp_path, lora_config(), content)


def test_overlap_is_found(tmp_path: Path) -> None:
    def overlap(header: dict[str, Any]) -> None:
        other = header[f"{PREFIX}.0.self_attn.v_proj.lora_A.weight"]
        other["data_offsets"] = list(header[Q_A]["data_offsets"])

    assert "overlaps" in refusal(tmp_path, lora_config(), _edited(overlap))


def test_a_huge_header_claim_reads_eight_bytes(tmp_path: Path) -> None:
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes((10 * 2**30).to_bytes(8, "little"))
    with path.open("r+b") as file:
        file.truncate(11 * 2**30)
    (tmp_path / "adapter_config.json").write_text(json.dumps(lora_config()))
    started = time.perf_counter()
    limits = RegistryConfig(max_adapter_bytes=20 * 2**30)
    with pytest.raises(BadAdapter, match="claims 10737418240 bytes"):
        check_adapter(tmp_path, bases={TINY.base_model_id: TINY}, digest_salt=SALT, config=limits)
    assert time.perf_counter() - started < 0.5
    with pytest.raises(BadAdapter, match="more than the allowed"):
        check_adapter(tmp_path, bases={TINY.base_model_id: TINY}, digest_salt=SALT, config=RegistryConfig())


def test_a_header_that_begins_like_a_pickle_is_still_a_header(tmp_path: Path) -> None:
    content = safetensors_bytes(lora_tensors(lora_config()))
    header_end = 8 + int.from_bytes(content[:8], "little")
    padded = content[8:header_end].ljust(0x0480)
    assert len(padded) == 0x0480
    assert with_header(padded, b"").startswith(b"\x80\x04")
    check(tmp_path, lora_config(), with_header(padded, content[header_end:]))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
GOOD_CONTENT = safetensors_bytes(lora_tensors(lora_config()))
FUZZ = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def _accepts_or_refuses(directory: Path, config: dict[str, Any] | bytes, content: Tensors | bytes) -> bool:
    try:
        check(directory, config, content)
    except BadAdapter:
        return False
    return True


@FUZZ
@given(config=st.binary(max_size=300), content=st.binary(max_size=300))
def test_arbitrary_bytes_are_bad_adapters(tmp_path: Path, config: bytes, content: bytes) -> None:
    assert not _accepts_or_refuses(tmp_path, config, GOOD_CONTENT)
    assert not _accepts_or_refuses(tmp_path, lora_config(), content)
    assert not _accepts_or_refuses(tmp_path, lora_config(), with_header(content, content))


@FUZZ
@given(key=st.sampled_from(sorted(lora_config())) | st.text(max_size=12), value=JSON)
def test_arbitrary_config_values_are_accepted_or_bad(tmp_path: Path, key: str, value: Any) -> None:
    _accepts_or_refuses(tmp_path, lora_config() | {key: value}, GOOD_CONTENT)


@FUZZ
@given(name=st.just(Q_A) | st.just("__metadata__") | st.text(max_size=12), value=JSON)
def test_arbitrary_header_entries_are_accepted_or_bad(tmp_path: Path, name: str, value: Any) -> None:
    _accepts_or_refuses(tmp_path, lora_config(), _edited(lambda header: header.update({name: value})))


@FUZZ
@given(
    field=st.sampled_from(["dtype", "shape", "data_offsets"]),
    value=JSON | st.lists(st.integers(-(2**70), 2**70), max_size=4),
)
def test_arbitrary_tensor_fields_are_accepted_or_bad(tmp_path: Path, field: str, value: Any) -> None:
    _accepts_or_refuses(tmp_path, lora_config(), _edited(_set(**{field: value})))


@FUZZ
@given(position=st.integers(0, len(GOOD_CONTENT) - 1), byte=st.integers(0, 255), cut=st.booleans())
def test_a_flipped_byte_or_a_cut(tmp_path: Path, position: int, byte: int, cut: bool) -> None:
    content = GOOD_CONTENT[:position] if cut else GOOD_CONTENT[:position] + bytes([byte]) + GOOD_CONTENT[position + 1 :]
    accepted = _accepts_or_refuses(tmp_path, lora_config(), content)
    assert not (cut and accepted)
