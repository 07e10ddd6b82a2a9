"""JSON answers encoded by msgspec. Used by the resource routes."""

from collections.abc import Sequence
from typing import Any

import msgspec
from starlette.responses import Response


def json_reply(body: dict[str, Any], *, status: int = 200) -> Response:
    return Response(msgspec.json.encode(body), status, media_type="application/json")


def json_list(data: Sequence[dict[str, Any]]) -> Response:
    return json_reply({"object": "list", "data": list(data)})
