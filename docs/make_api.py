"""Writes docs/api.md from what the gateway serves: its OpenAPI document and the gRPC protocol. Run it after a change of
a route, of its models or of the protocol; a test compares."""

import asyncio
import json
import re
from pathlib import Path
from typing import Any, cast

import httpx
from loraplex.core.control import ControlPlane
from loraplex.core.ids import GatewayId
from loraplex.gateway.config import GatewayConfig
from loraplex.gateway.gateway import Gateway
from loraplex.testing.fake_dispatcher import FakeDispatcher, Script
from loraplex.traces.recorder import RecorderCounters

HERE = Path(__file__).parent
OUTPUT = HERE / "api.md"
PROTO = HERE.parent / "platform" / "loraplex" / "gateway" / "proto" / "loraplex_v1.proto"
_HEAD = """# API reference

Made by `python docs/make_api.py` from the gateway's OpenAPI document (`/openapi.json` of a running platform) and the
gRPC protocol.

A key goes into `Authorization: Bearer KEY` or `x-api-key: KEY`. Errors are `{"error": {"message", "type", "param",
"code"}}` with one of the statuses in the table; 429 and some 503 carry `retry-after`.
"""


class _NoTracer:
    @property
    def counters(self) -> RecorderCounters:
        return RecorderCounters()

    def record(self, row: Any) -> None:
        raise AssertionError("nothing is served here")


def api_page() -> str:
    """The file's text."""
    document = asyncio.run(_document())
    return "\n".join([_HEAD, "## HTTP\n", *_routes(document), "## Models\n", *_models(document), *_grpc()]) + "\n"


async def _document() -> dict[str, Any]:
    gateway = Gateway(
        GatewayConfig(),
        gateway_id=GatewayId("documented"),
        control=cast(ControlPlane, None),  # never started: only its document is read
        dispatcher=FakeDispatcher(lambda _request: Script(tokens=())),
        tracer=_NoTracer(),
    )
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=gateway.http_app), base_url="http://api") as client:
        document: dict[str, Any] = (await client.get("/openapi.json")).json()
        return document


def _routes(document: dict[str, Any]) -> list[str]:
    by_tag: dict[str, list[str]] = {}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            given = [*_parameters(operation), *_body(operation)]
            row = (f"`{method.upper()} {path}`", _text(operation), ", ".join(given), _answers(operation))
            by_tag.setdefault(operation.get("tags", ["other"])[0], []).append(_row(*row))
    lines = []
    for tag, rows in by_tag.items():
        lines += [f"### {tag.capitalize()}\n", "| | | takes | answers |", "|---|---|---|---|", *rows, ""]
    return lines


def _text(operation: dict[str, Any]) -> str:
    return str(operation.get("description") or operation.get("summary", ""))


def _parameters(operation: dict[str, Any]) -> list[str]:
    found = [one for one in operation.get("parameters", ()) if one["in"] != "path"]
    return [f"`{one['name']}`{'' if one.get('required') else '?'} ({one['in']})" for one in found]


def _body(operation: dict[str, Any]) -> list[str]:
    content = operation.get("requestBody", {}).get("content", {})
    return [f"{_type(value.get('schema', {}))} as `{kind}`" for kind, value in content.items()]


def _answers(operation: dict[str, Any]) -> str:
    answers = []
    for status, response in sorted(operation["responses"].items()):
        kinds = response.get("content", {})
        types = {_type(value["schema"]) for value in kinds.values() if value.get("schema")}
        answers.append(f"{status} {' or '.join(sorted(types))}" if status.startswith("2") and types else status)
    return ", ".join(answers)


def _models(document: dict[str, Any]) -> list[str]:
    lines = []
    for name, model in sorted(document["components"]["schemas"].items()):
        lines.append(f"### {_name(name)}\n")
        if model.get("description"):
            lines.append(_flat(model["description"]) + "\n")
        if "properties" not in model:
            lines += [_type(model), ""]
            continue
        lines += ["| field | type | default | |", "|---|---|---|---|"]
        for field, schema in model["properties"].items():
            required = field in model.get("required", ())
            default = "required" if required else json.dumps(schema.get("default"))
            lines.append(_row(f"`{field}`", _type(schema), default, _bounds(schema)))
        lines.append("")
    return lines


def _type(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        name = _name(schema["$ref"].rpartition("/")[2])
        return f"[{name}](#{name.lower().replace('.', '')})"
    for several in ("anyOf", "oneOf", "allOf"):
        if several in schema:
            return " or ".join(_type(one) for one in schema[several])
    if "enum" in schema or "const" in schema:
        return " or ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    if isinstance(schema.get("additionalProperties"), dict):
        return f"map to {_type(schema['additionalProperties'])}"
    return str(schema.get("type", "any"))


def _name(schema: str) -> str:
    """Of two models that share a name FastAPI writes the modules."""
    return re.sub(r"^.*__(\w+)__(\w+)$", r"\1.\2", schema)


def _bounds(schema: dict[str, Any]) -> str:
    words = {
        "minimum": ">=",
        "exclusiveMinimum": ">",
        "maximum": "<=",
        "exclusiveMaximum": "<",
        "maxLength": "length <=",
    }
    found = [schema, *schema.get("anyOf", ())]
    bounds = [f"{sign} {one[word]}" for one in found for word, sign in words.items() if word in one]
    return _flat("; ".join(filter(None, [", ".join(bounds), schema.get("description", "")])))


def _grpc() -> list[str]:
    """The protocol as it is: its comments are its reference."""
    text = PROTO.read_text("utf-8")
    package = re.search(r"^package (.*);", text, re.MULTILINE)
    assert package is not None
    service = text[text.index("service Loraplex {") :].partition("\n}\n")[0]
    calls = re.findall(r"((?:  // .*\n)+)  rpc (\w+)\((stream )?(\w+)\) returns \((stream )?(\w+)\)", service)
    rows = [
        _row(f"`{name}`", " ".join(line.strip(" /") for line in said.splitlines()), f"{many}{asked}", f"{often}{given}")
        for said, name, many, asked, often, given in calls
    ]
    table = ["| call | | takes | answers |", "|---|---|---|---|", *rows, ""]
    return [f"## gRPC: `{package[1]}.Loraplex`\n", *table, "```proto", text.rstrip(), "```"]


def _row(*cells: str) -> str:
    return "| " + " | ".join(_flat(cell) for cell in cells) + " |"


def _flat(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    OUTPUT.write_text(api_page(), "utf-8")
