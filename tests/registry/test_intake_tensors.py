"""Strict intake of tensor files: wrong, broken and hostile ones are a BadAdapter that names the thing."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from loraplex.core.errors import BadAdapter
from loraplex.registry.config import RegistryConfig
from loraplex.registry.intake import check_adapter

from tests.registry.peft_files import (
    PREFIX,
    Q_A,
    SALT,
    TINY,
    check,
    edited,
    lora_config,
    lora_tensors,
    refusal,
    safetensors_bytes,
    with_fields,
    with_header,
)


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
        (edited(with_fields(dtype="I8")), "dtype 'I8'"),
        (edited(with_fields(dtype="F64")), "dtype 'F64'"),
        (edited(with_fields(shape=[2, 2])), "another number"),
        (edited(with_fields(shape=[-4, -16])), "no list of sizes"),
        (edited(with_fields(shape=[16, 4])), "has shape [16, 4]"),
        (edited(with_fields(shape=[1] * 9)), "no list of sizes"),
        (edited(with_fields(data_offsets=[0])), "no byte range"),
        (edited(with_fields(data_offsets=[256, 0])), "no byte range"),
        (edited(with_fields(data_offsets=[4, 260])), "gap before it"),
        (edited(with_fields(data_offsets=[256, 512])), "gap"),
        (edited(with_fields(extra=1)), "must have exactly"),
        (edited(lambda header: header.update(__metadata__={"a": 1})), "__metadata__"),
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

    assert "overlaps" in refusal(tmp_path, lora_config(), edited(overlap))


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
