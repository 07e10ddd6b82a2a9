"""What an adapter may be called. Pure; used by the registry and by the controller before an upload is opened."""

import re
from collections.abc import Collection

from loraplex.core.errors import InvalidInput

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}\Z")


def check_adapter_name(name: str, base_model_ids: Collection[str]) -> None:
    """Raises InvalidInput: a name is a file-name-safe word, and never that of a base model."""
    if not _NAME.match(name):
        raise InvalidInput(
            "an adapter name is 1 to 63 of a-z, 0-9, '.', '_', '-' and starts with a letter or digit", param="name"
        )
    if name in base_model_ids:
        raise InvalidInput(f"{name!r} is the name of a base model", param="name")
