"""The outermost ASGI layer: request id, arrival time, tenant path, key, limits of body and of open calls, last-resort
500.

Pure ASGI, nothing is buffered: it runs on the path of every token. Knows no resource, but that
adapter uploads alone are streamed and may be large.
"""

import logging
import re
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import nullcontext
from typing import Any

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from loraplex.core.errors import LoraplexError, PayloadTooLarge
from loraplex.gateway.call import CallInfo, request_id_of
from loraplex.gateway.routes.errors import error_response
from loraplex.gateway.service import GatewayService
from loraplex.telemetry.logs import request_id_var

logger = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

CALL_INFO = "loraplex.call_info"
PRINCIPAL = "loraplex.principal"

_UPLOAD_PATH = "/v1/adapters"
_TENANT_PATH = re.compile(r"/t/([^/]+)(/v1/.*)", re.DOTALL)


def bearer_key(authorization: str | None, api_key: str | None) -> str | None:
    """The key of an ``authorization`` or, without one, an ``x-api-key`` header."""
    if authorization is None:
        return api_key
    scheme, _, key = authorization.partition(" ")
    return key.strip() if scheme.lower() == "bearer" else None


class Edge:
    """Wraps the HTTP app. Below it, ``scope`` holds CALL_INFO always and PRINCIPAL on ``/v1/`` paths."""

    def __init__(self, app: App, service: GatewayService) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        info = CallInfo.begin(
            request_id_of(headers.get("x-request-id")), self._service.clock, traceparent=headers.get("traceparent")
        )
        token = request_id_var.set(info.request_id)
        id_header = (b"x-request-id", info.request_id.encode())
        started = finished = False

        async def send_with_id(message: Message) -> None:
            nonlocal started, finished
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message.get("headers", ()), id_header]
                if message["status"] >= 400:
                    self._service.metrics.refused(message["status"])
            elif message["type"] == "http.response.body":
                finished = not message.get("more_body", False)
            await send(message)

        try:
            scope[CALL_INFO] = info
            limited = self._admit(scope, headers, receive)
            # Probes and metrics, which need no key, are answered under any load.
            with self._service.open_calls.one_more() if PRINCIPAL in scope else nullcontext():
                await self._app(scope, limited, send_with_id)
        except ClientDisconnect:
            logger.info("the client left before its request was read")
        except Exception as error:
            if not isinstance(error, LoraplexError):
                logger.exception("%s %s failed", scope.get("method"), scope.get("path"))
            if not started:
                await error_response(error)(scope, receive, send_with_id)
            elif not finished:
                # The server then closes the connection, so that the client does not take the answer for whole.
                raise
        finally:
            request_id_var.reset(token)

    def _admit(self, scope: Scope, headers: Headers, receive: Receive) -> Receive:
        """Checks the key before a byte of the body is read, and bounds the body. Raises LoraplexError."""
        root: str = scope.get("root_path", "")
        path: str = scope["path"]
        inner = path.removeprefix(root) if root else path
        tenant: str | None = None
        match = _TENANT_PATH.fullmatch(inner)
        if match is not None:
            tenant, inner = match.group(1), match.group(2)
            scope["path"] = root + inner
            scope["raw_path"] = scope["path"].encode()
        if inner.startswith("/v1/"):
            key = bearer_key(headers.get("authorization"), headers.get("x-api-key"))
            scope[PRINCIPAL] = self._service.authenticate(key, path_tenant=tenant)
        config = self._service.config
        form = headers.get("content-type", "").lower().startswith("multipart/form-data")
        upload = form and inner == _UPLOAD_PATH
        limit = config.max_upload_bytes + config.max_body_bytes if upload else config.max_body_bytes
        declared = headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > limit:
            raise _too_large(limit)
        return _bounded(receive, limit)


def _too_large(limit: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"The request body may have {limit} bytes.")


def _bounded(receive: Receive, limit: int) -> Receive:
    """``receive`` that raises 413 once more than ``limit`` bytes of body came."""
    total = 0

    async def bounded() -> Message:
        nonlocal total
        message = await receive()
        if message["type"] == "http.request":
            total += len(message.get("body", b""))
            if total > limit:
                # FastAPI turns every other exception that rises while it reads a body into a 400.
                raise HTTPException(413, _too_large(limit).message)
        return message

    return bounded
