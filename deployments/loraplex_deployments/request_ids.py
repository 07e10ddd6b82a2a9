"""The request id of a call is decided once, before Ray Serve sees the request.

Serve takes over whatever ``x-request-id`` a client sends and appends it to the response. The middleware here stands
before that, in Serve's proxy or, behind HAProxy, in the gateway's own server, so that Serve, our logs and the client
have the same id, which is a sane one. Serve imports ``middlewares`` by name: see ``proxy``.
"""

from loraplex.gateway.call import request_id_of
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

CALLBACK = f"{__name__}:middlewares"
_HEADER = b"x-request-id"


def middlewares() -> list[Middleware]:
    return [Middleware(RequestIds)]


class RequestIds:
    """Keeps a sane ``x-request-id`` of the client, replaces any other, and gives one to a request without."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = scope["headers"]
            offered = next((value.decode("latin-1") for name, value in headers if name.lower() == _HEADER), None)
            others = [header for header in headers if header[0].lower() != _HEADER]
            scope = {**scope, "headers": [*others, (_HEADER, request_id_of(offered).encode())]}
        await self._app(scope, receive, send)
