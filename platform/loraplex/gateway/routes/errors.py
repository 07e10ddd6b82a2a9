"""The OpenAI error object, and the handlers that give every failure this shape. Used by the edge and the HTTP app."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match

from loraplex.core.errors import BadConfig, LoraplexError
from loraplex.gateway.status import retry_after_s, shown, status_of

logger = logging.getLogger(__name__)

_HTTP_CODES = {404: "unknown_url", 405: "method_not_allowed", 413: "payload_too_large", 415: "unsupported_media_type"}
_METHODS = ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT")
_LOCATIONS = ("body", "query", "path", "header")


def error_object(message: str, *, type: str, param: str | None, code: str | None) -> dict[str, Any]:
    return {"error": {"message": message, "type": type, "param": param, "code": code}}


def error_body(error: Exception) -> dict[str, Any]:
    """Says what ``shown`` leaves of the error."""
    told = shown(error)
    return error_object(told.message, type=status_of(error).type, param=told.param, code=told.code)


def error_headers(error: Exception) -> dict[str, str]:
    """``retry-after`` in whole seconds where a retry may help, ``www-authenticate`` on 401."""
    headers: dict[str, str] = {}
    wait_s = retry_after_s(error)
    if wait_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(wait_s)))
    if status_of(error).http == 401:
        headers["www-authenticate"] = "Bearer"
    return headers


def error_response(error: Exception) -> Response:
    return _json(status_of(error).http, error_body(error), error_headers(error))


def install_error_handlers(app: FastAPI) -> None:
    """Replaces FastAPI's own answers. Exceptions outside the error tree rise on to the edge, which logs them."""
    app.add_exception_handler(Exception, _on_bug)
    app.add_exception_handler(LoraplexError, _on_loraplex_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_error)


async def _on_bug(_request: Request, error: Exception) -> Response:
    return error_response(error)


async def _on_loraplex_error(_request: Request, error: Exception) -> Response:
    if isinstance(error, BadConfig):
        logger.error("a request met a misconfiguration: %s", error)
    return error_response(error)


async def _on_validation_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = _most_specific(error.errors())
    param = _param(first.get("loc", ()))
    if first.get("type") == "json_invalid":
        message, param, code = "The request body is not valid JSON.", None, "invalid_json"
    elif tuple(first.get("loc", ())) == ("body",) and not isinstance(first.get("input"), dict):
        message, code = _whole_body(first.get("input")), "invalid_body"
    else:
        reason = str(first.get("msg", "invalid")).removeprefix("Value error, ")
        message = f"Invalid value for '{param}': {reason}." if param else f"Invalid request: {reason}."
        code = "missing_required_parameter" if first.get("type") == "missing" else "invalid_value"
    return _json(400, error_object(message, type="invalid_request_error", param=param, code=code))


def _whole_body(body: Any) -> str:
    """What is wrong with a body that is no JSON object. FastAPI hands over bytes when no header says JSON."""
    if isinstance(body, bytes):
        return "The request body must be JSON and have the header 'content-type: application/json'."
    return "The request has no body." if body is None else "The request body must be a JSON object."


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    status = error.status_code
    message = str(error.detail)
    if status in (404, 405):
        message = f"{message}: {request.method} {request.url.path}"
    headers = dict(error.headers or {})
    if status == 405:
        # Starlette names the methods of the first route that matches the path only.
        headers["Allow"] = ", ".join(_methods(request))
    body = error_object(
        message,
        type="invalid_request_error" if status < 500 else "server_error",
        param=None,
        code=_HTTP_CODES.get(status, "invalid_request"),
    )
    return _json(status, body, headers)


def _methods(request: Request) -> list[str]:
    """All that some route takes of the requested path."""
    return [
        method
        for method in _METHODS
        if any(route.matches({**request.scope, "method": method})[0] is Match.FULL for route in request.app.routes)
    ]


def _most_specific(errors: Sequence[Any]) -> Mapping[str, Any]:
    """Of a union's complaints the one that got furthest into the value."""
    return max(errors, key=lambda e: len(e.get("loc", ())), default={})


def _param(location: Sequence[Any]) -> str | None:
    """('body', 'messages', 0, 'role') -> ``messages.0.role``; names of union branches are left out."""
    parts = [str(part) for part in location if not (isinstance(part, str) and not part.replace("_", "").isalnum())]
    if parts and parts[0] in _LOCATIONS:
        parts = parts[1:]
    return ".".join(parts) or None


def _json(status: int, body: dict[str, Any], headers: Mapping[str, str] | None = None) -> Response:
    content = msgspec.json.encode(body)
    return Response(content, status, headers=dict(headers or {}), media_type="application/json")
