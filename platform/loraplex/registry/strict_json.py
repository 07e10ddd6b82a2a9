"""JSON from strangers: one object, UTF-8, no key twice, no NaN. Used for adapter configs and safetensors headers."""

import json
from typing import Any, NoReturn

from loraplex.core.errors import BadAdapter


def parse_json_object(data: bytes, *, what: str, param: str) -> dict[str, Any]:
    """``what`` is named in messages. Raises BadAdapter, whatever ``data`` is."""

    def reject_constant(token: str) -> NoReturn:
        raise BadAdapter(f"{what}: {token} is not a JSON number", param=param)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise BadAdapter(f"{what}: the key {key[:80]!r} appears twice", param=param)
            result[key] = value
        return result

    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise BadAdapter(f"{what} is not UTF-8", param=param) from None
    try:
        value = json.loads(text, object_pairs_hook=unique, parse_constant=reject_constant)
    except RecursionError:
        raise BadAdapter(f"{what} is nested too deeply", param=param) from None
    except ValueError as error:
        raise BadAdapter(f"{what} is not JSON: {error}", param=param) from None
    if not isinstance(value, dict):
        raise BadAdapter(f"{what} is not a JSON object", param=param)
    return value
