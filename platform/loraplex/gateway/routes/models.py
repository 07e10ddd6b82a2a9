"""GET /v1/models and GET /v1/models/{id}."""

from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from loraplex.gateway.checks import check_text
from loraplex.gateway.directory import ResolvedModel
from loraplex.gateway.routes import replies
from loraplex.gateway.routes.access import Caller
from loraplex.gateway.routes.json_reply import json_list, json_reply
from loraplex.gateway.service import GatewayService


def model_reply(model: ResolvedModel) -> dict[str, Any]:
    """Shaped as ``replies.ModelReply``."""
    base = model.base
    adapter = model.adapter
    return {
        "id": model.model_id,
        "object": "model",
        "created": int(base.created_s if adapter is None else adapter.created_s),
        "owned_by": "loraplex" if adapter is None else adapter.ref.tenant,
        "root": base.base_model_id,
        "parent": None if adapter is None else base.base_model_id,
        "max_model_len": base.max_context_tokens,
    }


def model_routes(service: GatewayService) -> APIRouter:
    router = APIRouter(prefix="/v1/models", tags=["models"], responses=replies.ERRORS)

    @router.get("", response_model=replies.ModelList)
    async def list_models(caller: Caller) -> Response:
        return json_list([model_reply(model) for model in service.view.directory.models(caller)])

    @router.get("/{model_id:path}", response_model=replies.ModelReply)
    async def get_model(model_id: str, caller: Caller) -> Response:
        directory = service.view.directory
        return json_reply(model_reply(directory.resolve(caller, check_text(model_id, param="model"))))

    return router
