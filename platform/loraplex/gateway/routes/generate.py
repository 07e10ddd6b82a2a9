"""POST /v1/chat/completions and POST /v1/completions."""

from functools import partial
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from loraplex.gateway.routes import replies
from loraplex.gateway.routes.access import Caller, Info
from loraplex.gateway.routes.answer import EventStream, WholeReply
from loraplex.gateway.routes.encode import ChatChunks, CompletionChunks, chat_reply, completion_reply
from loraplex.gateway.routes.requests import ChatCompletionRequest, CompletionRequest
from loraplex.gateway.service import GatewayService


def _documented(reply: type[Any]) -> dict[int | str, dict[str, Any]]:
    return {
        **replies.ERRORS,
        200: {
            "model": reply,
            "description": "With `stream`: server-sent events, one per choice and engine step, then `data: [DONE]`.",
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
        },
    }


def generation_routes(service: GatewayService) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["generation"])

    @router.post("/chat/completions", response_model=None, responses=_documented(replies.ChatCompletionReply))
    async def create_chat_completion(body: ChatCompletionRequest, caller: Caller, info: Info) -> Response:
        generation = await service.generate(caller, body.call(service.config), info)
        if body.stream:
            chunks = ChatChunks(generation, model=body.model, include_usage=body.include_usage)
            return EventStream(generation, chunks, include_usage=body.include_usage)
        return WholeReply(generation, partial(chat_reply, generation, model=body.model))

    @router.post("/completions", response_model=None, responses=_documented(replies.CompletionReply))
    async def create_completion(body: CompletionRequest, caller: Caller, info: Info) -> Response:
        generation = await service.generate(caller, body.call(service.config), info)
        if body.stream:
            chunks = CompletionChunks(generation, model=body.model, include_usage=body.include_usage)
            return EventStream(generation, chunks, include_usage=body.include_usage)
        return WholeReply(generation, partial(completion_reply, generation, model=body.model))

    return router
