"""The JSON schema of the platform's YAML file: for editors, for ``loraplex config schema`` and, without what the chart
sets itself, for the Helm chart (``helm/make_schema.py``)."""

from typing import Any

import msgspec

from loraplex.config.keys import described, structs
from loraplex.config.platform import PlatformConfig


def platform_schema() -> dict[str, Any]:
    """JSON schema 2020-12; a struct is a definition under its own name, a key's text its description."""
    schema: dict[str, Any] = msgspec.json.schema(PlatformConfig)
    defs = schema["$defs"]
    for struct in structs():
        defs[struct.__name__] = described(defs[struct.__name__], struct)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Loraplex platform config", **schema}
