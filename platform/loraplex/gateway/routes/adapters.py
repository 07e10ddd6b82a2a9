"""/v1/adapters: register from an upload or an approved URL, list, versions, roll back, delete."""

from collections.abc import AsyncIterator
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from loraplex.core.control import AdapterView
from loraplex.core.errors import InvalidInput
from loraplex.gateway.adapter_service import ADAPTER_FILES, AdapterService
from loraplex.gateway.directory import Principal
from loraplex.gateway.routes import replies
from loraplex.gateway.routes.access import Caller
from loraplex.gateway.routes.json_reply import json_list, json_reply
from loraplex.gateway.routes.multipart import Piece, multipart_pieces

_MAX_NAME_BYTES = 256
_MAX_VERSION = 2**31 - 1

_BODY_SCHEMA: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["name", *ADAPTER_FILES],
                    "properties": {
                        "name": {"type": "string"},
                        **{file: {"type": "string", "format": "binary"} for file in ADAPTER_FILES},
                    },
                }
            },
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["name", "url"],
                    "properties": {"name": {"type": "string"}, "url": {"type": "string"}},
                }
            },
        },
    }
}


class RollbackRequest(BaseModel):
    model_config = ConfigDict(strict=True)

    version: Annotated[int, Field(ge=1, le=_MAX_VERSION)]


class _UrlRegistration(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    url: str


def adapter_reply(adapter: AdapterView) -> dict[str, Any]:
    """Shaped as ``replies.AdapterReply``."""
    ref = adapter.ref
    return {
        "id": ref.name,
        "object": "adapter",
        "name": ref.name,
        "version": ref.version,
        "digest": ref.digest,
        "base_model": adapter.base_model_id,
        "lora_rank": adapter.max_lora_rank,
        "bytes": adapter.num_bytes,
        "created": int(adapter.created_s),
        "current": adapter.current,
    }


def adapter_routes(adapters: AdapterService) -> APIRouter:
    router = APIRouter(prefix="/v1/adapters", tags=["adapters"], responses=replies.CHANGE_ERRORS)

    @router.post("", status_code=201, response_model=replies.AdapterReply, openapi_extra=_BODY_SCHEMA)
    async def register_adapter(request: Request, caller: Caller) -> Response:
        caller.require_adapter_management()
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind == "multipart/form-data":
            adapter = await _upload(adapters, caller, multipart_pieces(request))
        elif kind == "application/json":
            try:
                wanted = msgspec.json.decode(await request.body(), type=_UrlRegistration)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                raise InvalidInput(f"The request body is wrong: {error}") from error
            adapter = await adapters.register_url(caller, wanted.name, wanted.url)
        else:
            raise InvalidInput("Send multipart/form-data with the files, or application/json with a URL.")
        return json_reply(adapter_reply(adapter), status=201)

    @router.get("", response_model=replies.AdapterList)
    async def list_adapters(caller: Caller) -> Response:
        return json_list([adapter_reply(adapter) for adapter in adapters.list_current(caller)])

    @router.get("/{name}", response_model=replies.AdapterList)
    async def list_versions(name: str, caller: Caller) -> Response:
        return json_list([adapter_reply(adapter) for adapter in adapters.versions(caller, name)])

    @router.post("/{name}/rollback", response_model=replies.AdapterReply)
    async def roll_back(name: str, body: RollbackRequest, caller: Caller) -> Response:
        return json_reply(adapter_reply(await adapters.roll_back(caller, name, body.version)))

    @router.delete("/{name}", response_model=replies.DeletedReply)
    async def delete_adapter(
        name: str, caller: Caller, version: Annotated[int | None, Query(ge=1, le=_MAX_VERSION)] = None
    ) -> Response:
        await adapters.delete(caller, name, version)
        return json_reply({"id": name, "object": "adapter", "deleted": True})

    return router


async def _upload(adapters: AdapterService, caller: Principal, pieces: AsyncIterator[Piece]) -> AdapterView:
    """Reads ``name`` first, then streams the files. Raises InvalidInput when a file comes before the name."""
    name = bytearray()
    first: Piece | None = None
    async for piece in pieces:
        if piece.filename is not None or piece.field in ADAPTER_FILES:
            first = piece
            break
        if piece.field == "name":
            name += piece.data
            if len(name) > _MAX_NAME_BYTES:
                raise InvalidInput(f"'name' may have {_MAX_NAME_BYTES} bytes.", param="name")
    if not name:
        raise InvalidInput("The field 'name' is needed, before the files.", param="name")
    try:
        text = name.decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidInput("'name' is not valid UTF-8.", param="name") from None
    return await adapters.upload(caller, text, _files(first, pieces))


async def _files(first: Piece | None, rest: AsyncIterator[Piece]) -> AsyncIterator[tuple[str, bytes]]:
    if first is not None:
        yield _file_name(first), first.data
    async for piece in rest:
        if piece.filename is not None or piece.field in ADAPTER_FILES:
            yield _file_name(piece), piece.data


def _file_name(piece: Piece) -> str:
    """A file is known by its field or by its file name, as clients write either."""
    return piece.field if piece.field in ADAPTER_FILES else str(piece.filename)
