"""The outside of a safetensors file: header and layout. Nothing is believed before it is checked; no tensor is read.

Layout: 8 bytes little-endian N, N bytes of JSON, then the data. Each tensor names its byte range in the data; here the
ranges must follow each other without gap or overlap and end with the file. Knows nothing of LoRA. Used by ``intake``.
"""

from dataclasses import dataclass
from math import prod
from typing import Any, BinaryIO

from loraplex.core.errors import BadAdapter
from loraplex.registry.strict_json import parse_json_object

TENSORS_FILE = "adapter_model.safetensors"

DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_PICKLE_MAGICS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_LENGTH_BYTES = 8
_MAX_DIMENSIONS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """One tensor of the header; ``[begin, end)`` counts from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(file: BinaryIO, *, file_bytes: int, max_header_bytes: int) -> tuple[TensorEntry, ...]:
    """Entries in the order of their bytes, which cover the file from the end of the header to the end.

    Reads 8 bytes first and the header only when its claimed size is allowed and present. Raises BadAdapter.
    """
    prefix = file.read(_LENGTH_BYTES)
    if len(prefix) < _LENGTH_BYTES:
        raise bad_tensors(f"{len(prefix)} bytes are too few for a safetensors file")
    header_bytes = int.from_bytes(prefix, "little")
    if header_bytes > max_header_bytes:
        # Only now: a header of 640 bytes begins like a pickle, too.
        if prefix.startswith(_PICKLE_MAGICS):
            raise bad_tensors("this is a pickle or a zip archive; only safetensors are accepted")
        raise bad_tensors(f"the header claims {header_bytes} bytes, more than the allowed {max_header_bytes}")
    data_begin = _LENGTH_BYTES + header_bytes
    if data_begin > file_bytes:
        raise bad_tensors(f"the header claims {header_bytes} bytes, but the file ends after {file_bytes}: truncated?")
    raw = parse_json_object(file.read(header_bytes), what=f"{TENSORS_FILE}: the header", param=TENSORS_FILE)
    _check_metadata(raw.pop("__metadata__", {}))
    entries = sorted(
        (_entry(name, value, data_begin) for name, value in raw.items()), key=lambda entry: (entry.begin, entry.end)
    )
    _check_layout(entries, data_begin, file_bytes)
    return tuple(entries)


def bad_tensors(message: str) -> BadAdapter:
    return BadAdapter(f"{TENSORS_FILE}: {message}", param=TENSORS_FILE)


def shown_name(name: str) -> str:
    """A stranger's tensor name, fit for a message."""
    return repr(name if len(name) <= 120 else name[:117] + "...")


def _check_metadata(value: Any) -> None:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise bad_tensors("the header's __metadata__ must map strings to strings")


def _entry(name: str, value: Any, data_begin: int) -> TensorEntry:
    shown = shown_name(name)
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise bad_tensors(f"tensor {shown} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise bad_tensors(f"tensor {shown} has dtype {str(dtype)[:20]!r}; {', '.join(DTYPE_BYTES)} are accepted")
    if not _are_sizes(shape) or len(shape) > _MAX_DIMENSIONS:
        raise bad_tensors(f"tensor {shown} has a shape that is no list of sizes")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise bad_tensors(f"tensor {shown} has data_offsets that are no byte range")
    begin, end = offsets
    if end - begin != prod(shape) * DTYPE_BYTES[dtype]:
        raise bad_tensors(f"tensor {shown} takes {end - begin} bytes, but its shape and dtype need another number")
    return TensorEntry(name=name, dtype=dtype, shape=tuple(shape), begin=data_begin + begin, end=data_begin + end)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 2**63 for item in value
    )


def _check_layout(entries: list[TensorEntry], data_begin: int, file_bytes: int) -> None:
    position = data_begin
    for entry in entries:
        if entry.begin != position:
            what = "overlaps the one before it" if entry.begin < position else "leaves a gap before it"
            raise bad_tensors(f"tensor {shown_name(entry.name)} {what}")
        position = entry.end
        if position > file_bytes:
            raise bad_tensors(f"tensor {shown_name(entry.name)} ends beyond the end of the file: truncated?")
    if position != file_bytes:
        raise bad_tensors(f"{file_bytes - position} bytes follow the last tensor")
