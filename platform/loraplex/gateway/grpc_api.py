"""``loraplex.v1`` over the gateway's services, method by method.

Methods take (request, context) with nothing asked of the context but ``CallContext``, so that grpc.aio and Ray Serve's
gRPC proxy can both call them. On an error they set code, details and trailing metadata and raise the LoraplexError.
"""

import logging
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import grpc

from loraplex.core.control import AdapterView
from loraplex.core.errors import InvalidInput, LoraplexError
from loraplex.core.request import Priority
from loraplex.gateway.adapter_service import AdapterService
from loraplex.gateway.call import (
    CallInfo,
    ChatMessage,
    ChatPrompt,
    GenerateCall,
    Prompt,
    TextPrompt,
    TokenPrompt,
    request_id_of,
)
from loraplex.gateway.directory import Principal
from loraplex.gateway.generation import Generation
from loraplex.gateway.grpc_messages import adapter_message, delta_message, model_message, sampling_options
from loraplex.gateway.proto import loraplex_v1_pb2 as pb
from loraplex.gateway.routes.edge import bearer_key
from loraplex.gateway.service import GatewayService
from loraplex.gateway.status import retry_after_s, shown, status_of
from loraplex.telemetry.logs import request_id_var

logger = logging.getLogger(__name__)

REQUEST_ID_KEY = "x-request-id"
TENANT_KEY = "x-loraplex-tenant"
ERROR_DETAIL_KEY = "loraplex-error-bin"

_ROLES = ("system", "developer", "user", "assistant")


class CallContext(Protocol):
    """What grpc.aio's ServicerContext and Serve's RayServegRPCContext have in common."""

    def invocation_metadata(self) -> Iterable[tuple[str, str | bytes]] | None: ...

    def set_code(self, code: grpc.StatusCode) -> None: ...

    def set_details(self, details: str) -> None: ...

    def set_trailing_metadata(self, trailing_metadata: Any) -> None: ...


class LoraplexServicer:
    def __init__(self, service: GatewayService, adapters: AdapterService) -> None:
        self._service = service
        self._adapters = adapters

    async def Generate(  # noqa: N802 (the name of the method on the wire)
        self, request: pb.GenerateRequest, context: CallContext
    ) -> AsyncIterator[pb.GenerateResponse]:
        with self._call(context) as (info, principal):
            generation = await self._service.generate(principal, self._generate_call(request), info)
            try:
                async for response in _responses(generation):
                    yield response
            finally:
                generation.abort()

    async def ListModels(  # noqa: N802
        self, _request: pb.ListModelsRequest, context: CallContext
    ) -> pb.ListModelsResponse:
        with self._call(context) as (_, principal):
            models = self._service.view.directory.models(principal)
            return pb.ListModelsResponse(models=[model_message(model) for model in models])

    async def RegisterAdapter(  # noqa: N802
        self, requests: AsyncIterator[pb.RegisterAdapterRequest], context: CallContext
    ) -> pb.Adapter:
        with self._call(context) as (_, principal):
            principal.require_adapter_management()
            parts = aiter(requests)
            first = await anext(parts, None)
            if first is None or first.WhichOneof("part") != "name":
                raise InvalidInput("The first message must hold the adapter's name.", param="name")
            second = await anext(parts, None)
            if second is not None and second.WhichOneof("part") == "url":
                return adapter_message(await self._adapters.register_url(principal, first.name, second.url))
            return adapter_message(await self._adapters.upload(principal, first.name, _chunks(second, parts)))

    async def ListAdapters(  # noqa: N802
        self, request: pb.ListAdaptersRequest, context: CallContext
    ) -> pb.ListAdaptersResponse:
        with self._call(context) as (_, principal):
            adapters: Sequence[AdapterView]
            if request.HasField("name"):
                adapters = self._adapters.versions(principal, request.name)
            else:
                adapters = self._adapters.list_current(principal)
            return pb.ListAdaptersResponse(adapters=[adapter_message(adapter) for adapter in adapters])

    async def RollbackAdapter(  # noqa: N802
        self, request: pb.RollbackAdapterRequest, context: CallContext
    ) -> pb.Adapter:
        with self._call(context) as (_, principal):
            return adapter_message(await self._adapters.roll_back(principal, request.name, request.version))

    async def DeleteAdapter(  # noqa: N802
        self, request: pb.DeleteAdapterRequest, context: CallContext
    ) -> pb.DeleteAdapterResponse:
        with self._call(context) as (_, principal):
            version = request.version if request.HasField("version") else None
            await self._adapters.delete(principal, request.name, version)
            return pb.DeleteAdapterResponse()

    @contextmanager
    def _call(self, context: CallContext) -> Iterator[tuple[CallInfo, Principal]]:
        """Authenticates, and writes what goes wrong inside into ``context``."""
        metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        info = CallInfo.begin(
            request_id_of(metadata.get(REQUEST_ID_KEY)), self._service.clock, traceparent=metadata.get("traceparent")
        )
        context.set_trailing_metadata([(REQUEST_ID_KEY, info.request_id)])
        # Set but not reset: a generator may be closed in another context than it was started in.
        request_id_var.set(info.request_id)
        try:
            key = bearer_key(metadata.get("authorization"), metadata.get("x-api-key"))
            principal = self._service.authenticate(key, path_tenant=metadata.get(TENANT_KEY))
            with self._service.open_calls.one_more():
                yield info, principal
        except Exception as error:
            told = shown(error)
            self._fail(context, info, told)
            if told is error:
                raise
            logger.exception("a gRPC call failed")
            raise told from error

    def _fail(self, context: CallContext, info: CallInfo, error: LoraplexError) -> None:
        status = status_of(error)
        self._service.metrics.refused(status.http)
        detail = pb.ErrorDetail(code=error.code, param=error.param, retry_after_s=retry_after_s(error))
        context.set_code(status.grpc)
        context.set_details(error.message)
        context.set_trailing_metadata(
            [(REQUEST_ID_KEY, info.request_id), (ERROR_DETAIL_KEY, detail.SerializeToString())]
        )

    def _generate_call(self, request: pb.GenerateRequest) -> GenerateCall:
        if not request.model:
            raise InvalidInput("'model' is needed.", param="model")
        kind = request.WhichOneof("prompt")
        return GenerateCall(
            endpoint="grpc.generate",
            model=request.model,
            prompts=(_prompt(request, kind),),
            options=sampling_options(request.sampling),
            default_max_tokens=None if kind == "chat" else self._service.config.default_completion_tokens,
            max_logprobs=self._service.config.max_chat_logprobs,
            priority=Priority.OFFLINE if request.priority == pb.PRIORITY_OFFLINE else Priority.ONLINE,
            stream=True,
        )


def _prompt(request: pb.GenerateRequest, kind: str | None) -> Prompt:
    if kind == "text":
        return TextPrompt(text=request.text)
    if kind == "tokens":
        return TokenPrompt(token_ids=tuple(request.tokens.token_ids))
    if kind != "chat":
        raise InvalidInput("One of 'text', 'chat' and 'tokens' is needed.", param="prompt")
    for index, message in enumerate(request.chat.messages):
        if message.role not in _ROLES:
            raise InvalidInput(f"'role' must be one of {', '.join(_ROLES)}.", param=f"chat.messages.{index}.role")
    return ChatPrompt(messages=tuple(ChatMessage(role=m.role, content=m.content) for m in request.chat.messages))


async def _responses(generation: Generation) -> AsyncIterator[pb.GenerateResponse]:
    """One message per engine step; the usage rides on the last."""
    deltas = await generation.next_deltas()
    while deltas:
        response = pb.GenerateResponse(deltas=[delta_message(generation, delta) for delta in deltas])
        if generation.ended:
            usage = generation.usage
            response.usage.prompt_tokens = usage.prompt_tokens
            response.usage.cached_tokens = usage.cached_tokens
            response.usage.completion_tokens = usage.completion_tokens
        yield response
        deltas = await generation.next_deltas()


async def _chunks(
    first: pb.RegisterAdapterRequest | None, rest: AsyncIterator[pb.RegisterAdapterRequest]
) -> AsyncIterator[tuple[str, bytes]]:
    message = first
    while message is not None:
        if message.WhichOneof("part") != "chunk":
            raise InvalidInput("After the name come chunks of the two files.", param="chunk")
        yield message.chunk.filename, message.chunk.data
        message = await anext(rest, None)
