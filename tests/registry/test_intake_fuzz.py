"""Intake of arbitrary bytes and values: an adapter or a BadAdapter, never anything else."""

from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loraplex.core.errors import BadAdapter

from tests.registry.peft_files import (
    Q_A,
    Tensors,
    check,
    edited,
    lora_config,
    lora_tensors,
    safetensors_bytes,
    with_fields,
    with_header,
)

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
    _accepts_or_refuses(tmp_path, lora_config(), edited(lambda header: header.update({name: value})))


@FUZZ
@given(
    field=st.sampled_from(["dtype", "shape", "data_offsets"]),
    value=JSON | st.lists(st.integers(-(2**70), 2**70), max_size=4),
)
def test_arbitrary_tensor_fields_are_accepted_or_bad(tmp_path: Path, field: str, value: Any) -> None:
    _accepts_or_refuses(tmp_path, lora_config(), edited(with_fields(**{field: value})))


@FUZZ
@given(position=st.integers(0, len(GOOD_CONTENT) - 1), byte=st.integers(0, 255), cut=st.booleans())
def test_a_flipped_byte_or_a_cut(tmp_path: Path, position: int, byte: int, cut: bool) -> None:
    content = GOOD_CONTENT[:position] if cut else GOOD_CONTENT[:position] + bytes([byte]) + GOOD_CONTENT[position + 1 :]
    accepted = _accepts_or_refuses(tmp_path, lora_config(), content)
    assert not (cut and accepted)
