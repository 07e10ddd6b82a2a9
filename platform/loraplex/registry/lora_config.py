"""Reads a PEFT ``adapter_config.json`` into the few values that matter, and refuses by name what is not supported.

Works by a list of what is known: an option that is neither understood nor known to be harmless is refused when it is
set, so that a new PEFT feature is never served as if it were plain LoRA. Pure; used by ``intake``.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from loraplex.core.errors import BadAdapter
from loraplex.core.model import LORA_MODULES, ModelSpec
from loraplex.registry.strict_json import parse_json_object

CONFIG_FILE = "adapter_config.json"

_UNDERSTOOD = frozenset(
    {
        "peft_type",
        "task_type",
        "base_model_name_or_path",
        "r",
        "lora_alpha",
        "target_modules",
        "rank_pattern",
        "alpha_pattern",
        "use_rslora",
        "bias",
        "init_lora_weights",
        "layers_to_transform",
        "layers_pattern",
    }
)
# Training or bookkeeping only, or settings of a feature that another option switches on.
_HARMLESS = frozenset(
    {
        "auto_mapping",
        "peft_version",
        "revision",
        "inference_mode",
        "lora_dropout",
        "megatron_core",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "qalora_group_size",
        "runtime_config",
        "ensure_weight_tying",
    }
)
_REFUSED = {
    "use_dora": "DoRA (use_dora)",
    "modules_to_save": "modules_to_save (fully trained modules)",
    "lora_bias": "lora_bias",
    "fan_in_fan_out": "fan_in_fan_out",
    "use_qalora": "QALoRA (use_qalora)",
    "use_bdlora": "block-diagonal LoRA (use_bdlora)",
    "alora_invocation_tokens": "activated LoRA (alora_invocation_tokens)",
    "trainable_token_indices": "trainable_token_indices",
    "target_parameters": "target_parameters",
    "layer_replication": "layer_replication",
    "exclude_modules": "exclude_modules",
    "megatron_config": "megatron_config",
    "arrow_config": "Arrow routing (arrow_config)",
}
V = TypeVar("V")

_PLAIN_INITS = ("gaussian", "eva", "orthogonal")
_MAX_SCALE = 65504.0
"""Largest half-precision number: a larger scale cannot be folded into B."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """What an adapter config says, checked but not yet held against a base."""

    base_model_name: str | None
    lora_rank: int
    alpha: float
    targets: frozenset[str]
    """Module names, or dotted suffixes of module paths, as PEFT writes them for ``all-linear``."""
    layers: tuple[int, ...] | None
    """None: all layers."""
    rank_pattern: Mapping[str, int]
    """Dotted suffix of a module's path -> rank; the first key that matches counts, as in PEFT."""
    alpha_pattern: Mapping[str, float]
    use_rslora: bool

    def targets_path(self, path: str) -> bool:
        """``path``: e.g. ``model.layers.0.self_attn.q_proj``. Like PEFT: a target names a path or its dotted end."""
        parts = path.split(".")
        return any(".".join(parts[start:]) in self.targets for start in range(len(parts)))

    def block_rank(self, path: str) -> int:
        return _first_match(self.rank_pattern, path, self.lora_rank)

    def block_scale(self, path: str) -> float:
        """alpha / r, or alpha / sqrt(r) for rsLoRA. Raises BadAdapter when half precision cannot hold it."""
        rank = self.block_rank(path)
        alpha = _first_match(self.alpha_pattern, path, self.alpha)
        scale = alpha / math.sqrt(rank) if self.use_rslora else alpha / rank
        if not 0 < scale <= _MAX_SCALE:
            raise _bad(f"the scale {scale:g} of {path} (alpha {alpha:g}, r {rank}) is not in (0, {_MAX_SCALE:g}]")
        return scale


def parse_lora_config(data: bytes, *, max_lora_rank: int) -> LoraConfig:
    """Raises BadAdapter naming the option, whatever ``data`` is."""
    raw = parse_json_object(data, what=CONFIG_FILE, param=CONFIG_FILE)
    _check_kind(raw)
    _check_features(raw)
    name = raw.get("base_model_name_or_path")
    if name is not None and not isinstance(name, str):
        raise _bad("base_model_name_or_path must be a string")
    return LoraConfig(
        base_model_name=name or None,
        lora_rank=_rank(raw.get("r"), "r", max_lora_rank),
        alpha=_alpha(raw.get("lora_alpha"), "lora_alpha"),
        targets=_targets(raw.get("target_modules")),
        layers=_layers(raw),
        rank_pattern={
            _pattern_key(key, "rank_pattern"): _rank(value, f"rank_pattern[{_shown(key)}]", max_lora_rank)
            for key, value in _pattern(raw, "rank_pattern").items()
        },
        alpha_pattern={
            _pattern_key(key, "alpha_pattern"): _alpha(value, f"alpha_pattern[{_shown(key)}]")
            for key, value in _pattern(raw, "alpha_pattern").items()
        },
        use_rslora=_flag(raw, "use_rslora"),
    )


def module_path(layer: int, module: str) -> str:
    """Where a projection lies in the base model, as PEFT names it."""
    parent = "self_attn" if module in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
    return f"model.layers.{layer}.{parent}.{module}"


def check_layers(config: LoraConfig, spec: ModelSpec) -> tuple[int, ...]:
    """The layers that carry LoRA. Raises BadAdapter when the base has fewer."""
    if config.layers is None:
        return tuple(range(spec.num_layers))
    if config.layers[-1] >= spec.num_layers:
        raise _bad(
            f"layers_to_transform names layer {config.layers[-1]}, but base model {spec.base_model_id!r} has "
            f"{spec.num_layers} layers"
        )
    return config.layers


def _bad(message: str) -> BadAdapter:
    return BadAdapter(f"{CONFIG_FILE}: {message}", param=CONFIG_FILE)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _check_kind(raw: Mapping[str, Any]) -> None:
    if raw.get("peft_type") != "LORA":
        raise _bad(f"peft_type {_shown(raw.get('peft_type'))} is not supported, only 'LORA' is")
    if raw.get("task_type") not in (None, "CAUSAL_LM"):
        raise _bad(f"task_type {_shown(raw['task_type'])} is not supported, only 'CAUSAL_LM' is")
    if raw.get("bias", "none") != "none":
        raise _bad(f"bias {_shown(raw['bias'])} is not supported, only 'none' is")
    init = raw.get("init_lora_weights", True)
    if not (init is None or isinstance(init, bool) or init in _PLAIN_INITS):
        raise _bad(
            f"init_lora_weights {_shown(init)} is not supported: it changes the base weights; convert the adapter to "
            "plain LoRA when saving it (path_initial_model_for_weight_conversion)"
        )


def _check_features(raw: Mapping[str, Any]) -> None:
    for key, value in raw.items():
        if key in _UNDERSTOOD or key in _HARMLESS or not value:
            continue
        feature = _REFUSED.get(key)
        if feature is not None:
            raise _bad(f"{feature} is not supported")
        raise _bad(f"the option {_shown(key)} is not known here and may change what the adapter means")


def _rank(value: Any, key: str, max_lora_rank: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise _bad(f"{key} must be an integer, got {_shown(value)}")
    if not 1 <= value <= max_lora_rank:
        raise _bad(f"{key} is {_shown(value)}; ranks from 1 to {max_lora_rank} are accepted")
    return value


def _alpha(value: Any, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _bad(f"{key} must be a number, got {_shown(value)}")
    try:
        alpha = float(value)
    except OverflowError:
        alpha = math.inf
    if not (math.isfinite(alpha) and alpha > 0):
        raise _bad(f"{key} must be finite and greater than 0, got {_shown(value)}")
    return alpha


def _flag(raw: Mapping[str, Any], key: str) -> bool:
    value = raw.get(key, False)
    if value is not None and not isinstance(value, bool):
        raise _bad(f"{key} must be true or false, got {_shown(value)}")
    return bool(value)


def _targets(value: Any) -> frozenset[str]:
    if isinstance(value, str):
        raise _bad(
            f"target_modules {_shown(value)} is a pattern, which is not supported; list the module names literally: "
            f"{', '.join(LORA_MODULES)}"
        )
    if not isinstance(value, list) or not value:
        raise _bad("target_modules must be a list of module names")
    for name in value:
        if not isinstance(name, str) or name.rsplit(".", 1)[-1] not in LORA_MODULES:
            raise _bad(f"target_modules: {_shown(name)} is not supported, only {', '.join(LORA_MODULES)} are")
    return frozenset(value)


def _layers(raw: Mapping[str, Any]) -> tuple[int, ...] | None:
    if raw.get("layers_pattern") not in (None, "", [], "layers", ["layers"]):
        raise _bad(f"layers_pattern {_shown(raw['layers_pattern'])} is not supported")
    value = raw.get("layers_to_transform")
    if value is None:
        return None
    layers = value if isinstance(value, list) else [value]
    if not layers or not all(isinstance(x, int) and not isinstance(x, bool) and x >= 0 for x in layers):
        raise _bad("layers_to_transform must be a layer number or a list of them")
    return tuple(sorted(set(layers)))


def _pattern(raw: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = raw.get(key)
    if value is not None and not isinstance(value, dict):
        raise _bad(f"{key} must be an object")
    return value or {}


def _pattern_key(key: str, where: str) -> str:
    """PEFT matches ``(.*\\.)?(key)$``. Literal keys, with or without ^, $ and escaped dots, mean a dotted suffix."""
    literal = key.removeprefix("^").removesuffix("$").replace("\\.", ".")
    if not literal or not all(part.isidentifier() or part.isdecimal() for part in literal.split(".")):
        raise _bad(f"{where}: the key {_shown(key)} is a regular expression; only literal module names are supported")
    # An anchored key must match from the start of the path, which is ``model``.
    return f"^{literal}" if key.startswith("^") else literal


def _first_match(pattern: Mapping[str, V], path: str, default: V) -> V:
    for key, value in pattern.items():
        if key == f"^{path}" or key == path or path.endswith(f".{key}"):
            return value
    return default
