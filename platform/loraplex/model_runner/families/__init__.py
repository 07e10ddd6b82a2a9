"""The table of model families; one small file for each. Looked up by ``model_type`` or ``ModelSpec.family``."""

from loraplex.core.errors import BadConfig
from loraplex.model_runner.families.family import Family
from loraplex.model_runner.families.llama import LLAMA
from loraplex.model_runner.families.mistral import MISTRAL
from loraplex.model_runner.families.qwen2 import QWEN2
from loraplex.model_runner.families.qwen3 import QWEN3

_FAMILIES = {family.name: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3)}


def family_by_name(name: str, *, source: str) -> Family:
    """Raises BadConfig naming the architecture and ``source`` when it is none of ours."""
    try:
        return _FAMILIES[name]
    except KeyError:
        known = ", ".join(_FAMILIES)
        raise BadConfig(f"{source}: architecture {name!r} is not supported (known: {known})") from None


__all__ = ["Family", "family_by_name"]
