"""Every key of the platform's config: path, type, default, unit and documentation, read from the structs themselves.

The one source of ``loraplex config explain``, of the JSON schema (``schema``) and, through that, of the Helm chart's.
A key's text is the string below it in its struct; its unit is the ending of its name.
"""

import ast
import dataclasses
import functools
import inspect
import json
import re
import textwrap
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec import inspect as types

from loraplex.config.platform import PlatformConfig
from loraplex.config.problems import struct_in

_UNITS = (("_ms", "milliseconds"), ("_s", "seconds"), ("_bytes", "bytes"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    path: str
    """``base_models[].engine.max_running``; ``[]`` is each entry of a list."""
    type: str
    default: str
    """As YAML would have it; empty where the key must be given."""
    unit: str
    """``seconds``, ``milliseconds``, ``bytes`` or empty."""
    doc: str


def keys(path: str = "") -> tuple[Key, ...]:
    """Those at and below ``path``, all without one, in the order of the structs. Indices are ignored:
    ``base_models[0]`` is ``base_models[]``, which may also be left out. Empty when there is no such key."""
    wanted = _plain(path)
    found = _all_keys()
    return tuple(key for key in found if not wanted or (_plain(key.path) + ".").startswith(wanted + "."))


def struct_docs(struct: type[Any]) -> dict[str, str]:
    """Field -> its text on one line. Fields without one are left out."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(struct))).body
    assert isinstance(definition, ast.ClassDef)
    docs: dict[str, str] = {}
    for field, below in zip(definition.body, definition.body[1:], strict=False):
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
            continue
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and isinstance(below.value.value, str):
            docs[field.target.id] = _told(below.value.value)
    return docs


def _told(text: str) -> str:
    """On one line, in the words of YAML."""
    return re.sub(r"\bNone\b", "null", " ".join(text.split()).replace("``", "`"))


def structs() -> tuple[type[Any], ...]:
    """All that the config is composed of, each once."""
    return tuple(dict.fromkeys(struct for struct, _ in _fields(PlatformConfig, "")))


@functools.cache
def _all_keys() -> tuple[Key, ...]:
    return tuple(
        Key(
            path=path + field.encode_name,
            type=_type(field.type),
            default=_default(field),
            unit=next((unit for ending, unit in _UNITS if field.name.endswith(ending)), ""),
            doc=struct_docs(struct).get(field.name) or _section_doc(hints[field.name]),
        )
        for struct, path in _fields(PlatformConfig, "")
        for hints in (typing.get_type_hints(struct, include_extras=True),)
        for field in _info(struct).fields
    )


def _fields(struct: type[Any], path: str) -> Iterator[tuple[type[Any], str]]:
    """Structs with the paths that lead to them, each before those inside it."""
    yield struct, path
    hints = typing.get_type_hints(struct, include_extras=True)
    for field in _info(struct).fields:
        inner, is_list = struct_in(hints[field.name])
        if inner is not None:
            yield from _fields(inner, f"{path}{field.encode_name}{'[]' if is_list else ''}.")


def _info(struct: type[Any]) -> types.StructType | types.DataclassType:
    info = types.type_info(struct)
    assert isinstance(info, types.StructType | types.DataclassType)
    return info


def _section_doc(hint: Any) -> str:
    """A section without a text of its own: what its struct says of itself, or the module that has it."""
    struct, _ = struct_in(hint)
    if struct is None:
        return ""
    own = struct.__dict__.get("__doc__") or inspect.getdoc(inspect.getmodule(struct)) or ""
    return _told(own)


def _default(field: types.Field) -> str:
    if field.required:
        return ""
    value = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
    if isinstance(value, msgspec.Struct) or dataclasses.is_dataclass(value):
        return "(below)"
    return json.dumps(msgspec.to_builtins(value))


def _type(kind: types.Type) -> str:
    match kind:
        case types.UnionType():
            return " or ".join(_type(one) for one in kind.types)
        case types.LiteralType():
            return " or ".join(str(value) for value in kind.values)
        case types.VarTupleType():
            return f"list of {_type(kind.item_type)}"
        case types.DictType():
            return f"map of {_type(kind.key_type)} to {_type(kind.value_type)}"
        case types.StructType() | types.DataclassType():
            return "section"
        case types.IntType() | types.FloatType():
            return _number(kind)
        case types.NoneType():
            return "null"
    return {types.StrType: "text", types.BoolType: "true or false"}[type(kind)]


def _number(kind: types.IntType | types.FloatType) -> str:
    word = "integer" if isinstance(kind, types.IntType) else "number"
    bounds = ((">=", kind.ge), (">", kind.gt), ("<=", kind.le), ("<", kind.lt))
    return " ".join([word, *(f"{sign} {bound}" for sign, bound in bounds if bound is not None)])


def _plain(path: str) -> str:
    """Without indices."""
    return ".".join(part.partition("[")[0] for part in path.split("."))


def described(schema: dict[str, Any], struct: type[Any]) -> dict[str, Any]:
    """``schema`` of the struct with its texts as descriptions, and no further keys: a dataclass has none either."""
    docs = struct_docs(struct)
    properties = {
        name: {**value, "description": docs[name]} if name in docs else value
        for name, value in schema["properties"].items()
    }
    return {**schema, "properties": properties, "additionalProperties": False}
