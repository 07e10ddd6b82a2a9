"""Hugging Face model directories: config.json to a ModelSpec, safetensors (one file or shards) to named tensors.

Reads files and nothing else; no pickle. Called by ``build``. Which keys mean what is each family's own business.
"""

import json
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from loraplex.core.errors import BadConfig
from loraplex.core.ids import BaseModelId
from loraplex.core.model import ModelSpec
from loraplex.model_runner.families import family_by_name

_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"


def read_checkpoint_spec(directory: Path, base_model_id: BaseModelId) -> ModelSpec:
    """Raises BadConfig naming the file and key, or the architecture that is not supported."""
    path = directory / "config.json"
    config = _read_json(path)
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise BadConfig(f"{path}: model_type is missing")
    family = family_by_name(model_type, source=str(path))
    generation_path = directory / "generation_config.json"
    if generation_path.exists():
        # What instruct checkpoints stop at often stands only here.
        config = {**config, **{k: v for k, v in _read_json(generation_path).items() if k == "eos_token_id" and v}}
    return family.read_spec(config, base_model_id, source=str(path))


def read_checkpoint_tensors(
    directory: Path, *, without: Container[str] = frozenset()
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor on the CPU) of every file, one at a time, but those named in ``without``. BadConfig when a file is
    missing or not safetensors."""
    for path in _shards(directory):
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                for name in file.keys():  # noqa: SIM118  (the handle is no dict)
                    if name not in without:
                        yield name, file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise BadConfig(f"{path}: not a readable safetensors file: {error}") from error


def _shards(directory: Path) -> list[Path]:
    index_path = directory / _INDEX_FILE
    if index_path.exists():
        weight_map = _read_json(index_path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise BadConfig(f"{index_path}: weight_map is missing")
        names = sorted({str(name) for name in weight_map.values()})
        if any(Path(name).name != name for name in names):
            raise BadConfig(f"{index_path}: weight_map leads out of the directory")
        return [directory / name for name in names]
    if (directory / _SINGLE_FILE).exists():
        return [directory / _SINGLE_FILE]
    raise BadConfig(f"{directory}: neither {_SINGLE_FILE} nor {_INDEX_FILE}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise BadConfig(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise BadConfig(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise BadConfig(f"{path}: not a JSON object")
    return value
