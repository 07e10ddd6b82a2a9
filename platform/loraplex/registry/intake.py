"""Decides whether the two files of an adapter are one that a base model can serve, before anything loads them.

In: a directory with ``adapter_config.json`` and ``adapter_model.safetensors``, the served base models, the tenant's
salt. Out: a complete AdapterManifest, or BadAdapter with a sentence that names the file and the thing. Reads each byte
of the tensors once (digest and NaN check in one pass). Knows no database and no store. Called by the controller in a
worker thread, on files that nobody else writes.
"""

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from loraplex.core.adapter import AdapterBlock, AdapterManifest
from loraplex.core.errors import BadAdapter
from loraplex.core.ids import BaseModelId
from loraplex.core.model import LORA_MODULES, ModelSpec
from loraplex.registry.config import RegistryConfig
from loraplex.registry.identity import adapter_digest
from loraplex.registry.lora_config import CONFIG_FILE, LoraConfig, check_layers, module_path, parse_lora_config
from loraplex.registry.tensors_file import TENSORS_FILE, TensorEntry, bad_tensors, read_header, shown_name

# Bits of the exponent: all of them set means infinity or NaN.
_EXPONENT_BITS: dict[str, tuple[np.dtype[Any], int]] = {
    "F32": (np.dtype("<u4"), 0x7F800000),
    "F16": (np.dtype("<u2"), 0x7C00),
    "BF16": (np.dtype("<u2"), 0x7F80),
}
_UNSUPPORTED_TENSORS = (
    (re.compile(r"lora_magnitude_vector"), "DoRA (lora_magnitude_vector)"),
    (re.compile(r"lora_embedding_[AB]"), "LoRA on embeddings"),
    (re.compile(r"modules_to_save|embed_tokens|lm_head|norm\."), "modules_to_save (fully trained modules)"),
    (re.compile(r"\.bias\Z"), "bias"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedAdapter:
    manifest: AdapterManifest
    content_sha256: str
    """Lower-case hex, of the whole safetensors file."""


def check_adapter(
    directory: Path, *, bases: Mapping[BaseModelId, ModelSpec], digest_salt: str, config: RegistryConfig
) -> CheckedAdapter:
    """Raises BadAdapter and nothing else for any content of the two files; OSError when the disk fails."""
    lora = parse_lora_config(_read_config(directory, config), max_lora_rank=config.max_lora_rank)
    spec = choose_base(lora.base_model_name, bases)
    path = directory / TENSORS_FILE
    if not path.is_file():
        raise bad_tensors("the file is missing")
    with path.open("rb") as file:
        file_bytes = os.fstat(file.fileno()).st_size
        if file_bytes > config.max_adapter_bytes:
            raise bad_tensors(f"{file_bytes} bytes are more than the allowed {config.max_adapter_bytes}")
        entries = read_header(file, file_bytes=file_bytes, max_header_bytes=config.max_header_bytes)
        blocks = _match_tensors(entries, lora, spec)
        content_sha256 = _scan(file, entries, config.piece_bytes)
    digest = adapter_digest(
        digest_salt=digest_salt, base_model_id=spec.base_model_id, blocks=blocks, content_sha256=content_sha256
    )
    manifest = AdapterManifest(
        digest=digest, base_model_id=spec.base_model_id, blocks=tuple(blocks), num_bytes=file_bytes
    )
    return CheckedAdapter(manifest=manifest, content_sha256=content_sha256)


def choose_base(name: str | None, bases: Mapping[BaseModelId, ModelSpec]) -> ModelSpec:
    """The base that ``base_model_name_or_path`` means: its id, or a path or repository that ends with it.

    With a single served base the name is not needed: trainers write local paths there, and the shapes tell.
    Raises BadAdapter.
    """
    wanted = "" if name is None else name.rstrip("/").rsplit("/", 1)[-1].lower()
    for base_model_id, spec in bases.items():
        if base_model_id.lower() == wanted:
            return spec
    if len(bases) == 1:
        return next(iter(bases.values()))
    if not bases:
        raise BadAdapter("no base model is served yet", param=CONFIG_FILE)
    raise BadAdapter(
        f"{CONFIG_FILE}: base_model_name_or_path {(name or '')[:120]!r} names none of the served base models: "
        f"{', '.join(sorted(bases))}",
        param=CONFIG_FILE,
    )


def _read_config(directory: Path, config: RegistryConfig) -> bytes:
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise BadAdapter(f"{CONFIG_FILE}: the file is missing", param=CONFIG_FILE)
    with path.open("rb") as file:
        data = file.read(config.max_config_bytes + 1)
    if len(data) > config.max_config_bytes:
        raise BadAdapter(f"{CONFIG_FILE}: more than the allowed {config.max_config_bytes} bytes", param=CONFIG_FILE)
    return data


def _match_tensors(entries: Sequence[TensorEntry], lora: LoraConfig, spec: ModelSpec) -> list[AdapterBlock]:
    """Holds every tensor against what config and base call for. Returns the blocks in manifest order."""
    present = {entry.name: entry for entry in entries}
    blocks = []
    for layer in check_layers(lora, spec):
        for module in LORA_MODULES:
            path = module_path(layer, module)
            if not lora.targets_path(path):
                continue
            rank = lora.block_rank(path)
            in_features, out_features = spec.projection_shape(module)
            for part, shape in (("A", (rank, in_features)), ("B", (out_features, rank))):
                name = f"base_model.model.{path}.lora_{part}.weight"
                entry = present.pop(name, None)
                if entry is None:
                    raise bad_tensors(f"tensor {name!r} is missing, which {CONFIG_FILE} calls for")
                if entry.shape != shape:
                    raise bad_tensors(
                        f"tensor {name!r} has shape {list(entry.shape)}, but base model {spec.base_model_id!r} with "
                        f"rank {rank} needs {list(shape)}: wrong base model or wrong rank?"
                    )
            blocks.append(AdapterBlock(layer=layer, module=module, lora_rank=rank, scale=lora.block_scale(path)))
    for name in present:
        raise _unexpected(name)
    if not blocks:
        raise BadAdapter(f"{CONFIG_FILE}: target_modules match no module of the base model", param=CONFIG_FILE)
    return blocks


def _unexpected(name: str) -> BadAdapter:
    for pattern, feature in _UNSUPPORTED_TENSORS:
        if pattern.search(name):
            return bad_tensors(f"tensor {shown_name(name)}: {feature} is not supported")
    return bad_tensors(f"tensor {shown_name(name)} is not one that {CONFIG_FILE} and the base model call for")


def _scan(file: BinaryIO, entries: Sequence[TensorEntry], piece_bytes: int) -> str:
    """SHA-256 of the whole file; raises BadAdapter on an infinity or NaN and on a file that shrank meanwhile."""
    file.seek(0)
    sha256 = hashlib.sha256()
    sha256.update(file.read(entries[0].begin))
    # Pieces are multiples of every element size, and each tensor is read from its first element on.
    step = max(1, piece_bytes // 4) * 4
    for entry in entries:
        dtype, exponent = _EXPONENT_BITS[entry.dtype]
        position = entry.begin
        while position < entry.end:
            data = file.read(min(step, entry.end - position))
            if not data or len(data) % dtype.itemsize:
                raise bad_tensors("the file ended early")
            sha256.update(data)
            bits: Any = np.frombuffer(data, dtype=dtype)
            if bool(((bits & exponent) == exponent).any()):
                raise bad_tensors(f"tensor {shown_name(entry.name)} holds NaN or infinity")
            position += len(data)
    return sha256.hexdigest()
