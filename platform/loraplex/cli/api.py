"""Calls of the server's HTTP API. Owns how a refusal becomes an error. Called by the command groups."""

import json
from collections.abc import Iterator
from typing import Any

import httpx

from loraplex.cli.connection import Connection
from loraplex.core.errors import BadConfig, LoraplexError, Unavailable
from loraplex.loadgen.http_parser import SseParser

_TIMEOUT = httpx.Timeout(600.0, connect=10.0)


class Api:
    """One server with one key. Methods raise LoraplexError with what the server said, Unavailable when it cannot be
    reached, BadConfig for an address that is none."""

    def __init__(self, connection: Connection) -> None:
        self._headers = {} if connection.key is None else {"authorization": f"Bearer {connection.key}"}
        self._url = connection.url.rstrip("/")
        self._prefix = connection.prefix
        if not self._url.startswith(("http://", "https://")):
            raise BadConfig(f"URL {connection.url} does not start with http:// or https://")

    def get(self, path: str, **options: Any) -> Any:
        return self._call("GET", path, **options)

    def post(self, path: str, **options: Any) -> Any:
        """``options`` as httpx takes them: ``json``, ``data``, ``files``."""
        return self._call("POST", path, **options)

    def patch(self, path: str, **options: Any) -> Any:
        return self._call("PATCH", path, **options)

    def delete(self, path: str, **options: Any) -> Any:
        return self._call("DELETE", path, **options)

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[Any]:
        """The JSON of each server-sent event of a POST, as it arrives."""
        try:
            with self._client() as client, client.stream("POST", self._address(path), json=body) as response:
                if response.status_code != 200:
                    response.read()
                    raise _refused(response)
                parser = SseParser()
                for piece in response.iter_raw():
                    for event in parser.feed(piece):
                        if event == b"[DONE]":
                            return
                        yield _checked(json.loads(event))
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise self._unreachable(error) from error
        raise Unavailable(f"{self._url}: the answer ended in the middle")

    def _call(self, method: str, path: str, **options: Any) -> Any:
        try:
            with self._client() as client:
                response = client.request(method, self._address(path), **options)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise self._unreachable(error) from error
        if response.status_code >= 400:
            raise _refused(response)
        if not response.content:
            return None
        try:
            return response.json()
        except ValueError as error:
            raise LoraplexError(
                f"{self._url} answers {path} with something else than JSON: not a Loraplex server?"
            ) from error

    def _client(self) -> httpx.Client:
        """One per call: a command makes few, and no connection outlives its call."""
        return httpx.Client(headers=self._headers, timeout=_TIMEOUT)

    def _address(self, path: str) -> str:
        return f"{self._url}{self._prefix}/v1{path}"

    def _unreachable(self, error: Exception) -> Unavailable:
        return Unavailable(f"cannot reach {self._url}: {error or type(error).__name__}")


def _refused(response: httpx.Response) -> LoraplexError:
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = f"{response.request.method} {response.url}: {response.reason_phrase or 'refused'}"
    return LoraplexError(f"{message} (HTTP {response.status_code})")


def _checked(chunk: Any) -> Any:
    """Errors after the header of a stream come as an event."""
    if isinstance(chunk, dict) and "error" in chunk:
        error = chunk["error"]
        raise LoraplexError(str(error.get("message", error)) if isinstance(error, dict) else str(error))
    return chunk
