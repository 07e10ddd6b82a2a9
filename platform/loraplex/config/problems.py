"""All that is wrong with the values of a config, each with its path; msgspec itself stops at the first.

Knows types alone: which keys there are, which values they take, what a struct says of its own fields together.
"""

import re
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from loraplex.core.errors import BadConfig

_PLACE = re.compile(r"^(?P<what>.*?)(?: - at `\$\.?(?P<path>.*)`)?$", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Problem:
    path: str
    """As the file has it: ``base_models[0].engine.max_running``; empty for the whole."""
    what: str

    def __str__(self) -> str:
        return f"{self.path}: {self.what}" if self.path else self.what


def wrong_values(data: Any, struct: type[Any]) -> tuple[Problem, ...]:
    """``data`` as YAML gives it; ``struct`` the type that it should become. Nothing: ``msgspec.convert`` takes it."""
    return tuple(_of_struct(data, struct, ""))


def _of_struct(data: Any, struct: type[Any], path: str) -> Iterator[Problem]:
    if not isinstance(data, dict):
        yield Problem(path, f"expected keys and values (`object`), got {_said(data)}")
        return
    fields = {field.encode_name: field for field in msgspec.inspect.type_info(struct).fields}  # type: ignore[attr-defined]
    hints = typing.get_type_hints(struct, include_extras=True)
    found = False
    for key, value in data.items():
        where = f"{path}.{key}" if path else str(key)
        if key not in fields:
            problems = iter((Problem(where, "there is no such key"),))
        else:
            problems = _of_value(value, hints[fields[key].name], where)
        for problem in problems:
            found = True
            yield problem
    for key, field in fields.items():
        if field.required and key not in data:
            found = True
            yield Problem(f"{path}.{key}" if path else key, "is missing")
    if not found:
        yield from _converted(data, struct, path)


def _of_value(value: Any, kind: Any, path: str) -> Iterator[Problem]:
    inner, is_list = struct_in(kind)
    if inner is None or (value is None and type(None) in typing.get_args(kind)):
        yield from _converted(value, kind, path)
    elif not is_list:
        yield from _of_struct(value, inner, path)
    elif isinstance(value, list):
        for index, entry in enumerate(value):
            yield from _of_struct(entry, inner, f"{path}[{index}]")
    else:
        yield Problem(path, f"expected a list, got {_said(value)}")


def struct_in(kind: Any) -> tuple[type[Any] | None, bool]:
    """The struct or dataclass that ``kind`` is, is or null, or is a list of; whether it is a list."""
    if isinstance(kind, type) and (issubclass(kind, msgspec.Struct) or hasattr(kind, "__dataclass_fields__")):
        return kind, False
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        return struct_in(arguments[0])[0], True
    if type(None) in arguments:
        return next((struct_in(one) for one in arguments if struct_in(one)[0] is not None), (None, False))
    return None, False


def _converted(value: Any, kind: Any, path: str) -> Iterator[Problem]:
    try:
        msgspec.convert(value, kind)
    except (msgspec.ValidationError, BadConfig) as error:
        found = _PLACE.match(str(error))
        assert found is not None
        below = found["path"] or ""
        place = f"{path}{'' if not below or below.startswith('[') else '.'}{below}".strip(".")
        yield Problem(place, " ".join(found["what"].split()))


def _said(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
