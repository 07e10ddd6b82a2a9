"""The protocol-independent core of the gateway: a key and a call become a running ``Generation``.

HTTP and gRPC fronts call it alike. It knows keys, models, text, quota and the dispatcher; neither requests nor
responses of any protocol, nor replicas.
"""

import asyncio
import logging
import secrets

from loraplex.core.clock import Clock
from loraplex.core.errors import BadConfig, InvalidInput, LoraplexError
from loraplex.core.generation import Dispatcher, TokenStream
from loraplex.core.ids import RequestId
from loraplex.core.request import EngineRequest, Priority
from loraplex.core.tenant import TenantView
from loraplex.gateway.accounting import Account, Tracer
from loraplex.gateway.call import CallInfo, ChatPrompt, GenerateCall, Prompt, TextPrompt, TokenPrompt
from loraplex.gateway.checks import base_seed, check_call, check_text, check_token_ids, output_budget, sampling_params
from loraplex.gateway.choice import Choice
from loraplex.gateway.cluster_view import ClusterView
from loraplex.gateway.config import GatewayConfig
from loraplex.gateway.directory import Principal, ResolvedModel
from loraplex.gateway.generation import Generation
from loraplex.gateway.merge import MergedStream
from loraplex.gateway.open_calls import OpenCalls
from loraplex.gateway.status import HTTP_CLIENT_GONE, status_of
from loraplex.gateway.tokenizer import Codecs, TextCodec
from loraplex.telemetry.metrics import GatewayMetrics
from loraplex.telemetry.tracing import Tracing
from loraplex.tenancy.quota_gate import QuotaGate

logger = logging.getLogger(__name__)


class GatewayService:
    """One per gateway; all calls on one event loop."""

    def __init__(
        self,
        config: GatewayConfig,
        *,
        view: ClusterView,
        codecs: Codecs,
        quota: QuotaGate,
        dispatcher: Dispatcher,
        tracer: Tracer,
        metrics: GatewayMetrics,
        tracing: Tracing,
        clock: Clock,
        max_open_calls: int,
    ) -> None:
        self.config = config
        self.view = view
        self.metrics = metrics
        self.clock = clock
        self.open_calls = OpenCalls(max_open_calls)
        self._codecs = codecs
        self._quota = quota
        self._dispatcher = dispatcher
        self._tracer = tracer
        self._tracing = tracing

    def authenticate(self, key: str | None, *, path_tenant: str | None = None) -> Principal:
        """Raises Unauthenticated, NotFound (the tenant in the address is not the key's) or Unavailable."""
        return self.view.directory.authenticate(key, path_tenant=path_tenant)

    async def generate(self, principal: Principal, call: GenerateCall, info: CallInfo) -> Generation:
        """Checks, tokenizes, reserves quota and dispatches.

        Raises PermissionDenied; InvalidInput, NotFound, RateLimited, Overloaded or Unavailable, which leave a trace row
        and nothing else. On return the caller must drain the generation or abort it.
        """
        tenant = principal.require_generation()
        account = Account(
            call=call,
            info=info,
            tenant=tenant.name,
            quota=self._quota,
            metrics=self.metrics,
            tracer=self._tracer,
            tracing=self._tracing,
            clock=self.clock,
        )
        try:
            check_call(call, self.config)
            model = self.view.directory.resolve(principal, check_text(call.model, param="model"))
            account.model = model
            return await self._start(tenant, call, info, model, account)
        except Exception as error:
            account.close(status=status_of(error).http, finish_reason="error")
            raise
        except asyncio.CancelledError:
            account.close(status=HTTP_CLIENT_GONE, finish_reason="abort")
            raise

    async def _start(
        self, tenant: TenantView, call: GenerateCall, info: CallInfo, model: ResolvedModel, account: Account
    ) -> Generation:
        codec = await self._codec(model)
        prompts = [await self._encode(codec, prompt) for prompt in call.prompts]
        budgets = [
            output_budget(call, num_prompt_tokens=len(ids), max_context_tokens=model.base.max_context_tokens)
            for ids in prompts
        ]
        options = call.options
        requests: list[EngineRequest] = []
        choices: dict[RequestId, Choice] = {}
        stem = secrets.token_hex(12)
        for prompt_index, (token_ids, budget) in enumerate(zip(prompts, budgets, strict=True)):
            # Per prompt: a seeded prompt gives the same text alone and beside others, unseeded equal ones differ.
            seed = base_seed(options)
            for number in range(options.n):
                index = len(requests)
                request = EngineRequest(
                    request_id=RequestId(f"{stem}-{index}"),
                    tenant=tenant.name,
                    base_model_id=model.base.base_model_id,
                    adapter=None if model.adapter is None else model.adapter.ref,
                    prompt_token_ids=token_ids,
                    sampling=sampling_params(
                        options, max_tokens=budget, seed=seed + number, vocab_size=codec.vocab_size
                    ),
                    arrival_s=info.arrival_s,
                    cache_salt=tenant.cache_salt,
                    priority=call.priority,
                    deadline_s=self._deadline_s(call, info),
                    traceparent=account.span.traceparent,
                    weight=tenant.limits.weight or 1,
                )
                requests.append(request)
                choices[request.request_id] = Choice(
                    index=index,
                    prompt_index=prompt_index,
                    detokenizer=codec.detokenizer(token_ids),
                    stops=options.stop,
                    stop_token_ids=options.stop_token_ids,
                    min_tokens=options.min_tokens or 0,
                )
        num_prompt_tokens = sum(len(ids) for ids in prompts)
        account.reserve(prompt_tokens=num_prompt_tokens, output_tokens=options.n * self._reserved(call, budgets))
        echoed = tuple(codec.decode(ids) for ids in prompts) if call.echo else ()
        return Generation(
            streams=self._dispatch(requests, separately=bool(options.stop)),
            choices=choices,
            prompts=echoed,
            prompt_tokens=num_prompt_tokens,
            account=account,
            codec=codec,
            num_logprobs=options.num_logprobs,
        )

    def _dispatch(self, requests: list[EngineRequest], *, separately: bool) -> TokenStream | MergedStream:
        """One dispatch for all, or one for each where a stop string may end one choice before the others."""
        if not separately or len(requests) == 1:
            return self._dispatcher.dispatch(tuple(requests))
        streams: list[TokenStream] = []
        try:
            for request in requests:
                streams.append(self._dispatcher.dispatch((request,)))
        except LoraplexError:
            for stream in streams:
                stream.abort()
            raise
        return MergedStream(streams)

    def _reserved(self, call: GenerateCall, budgets: list[int]) -> int:
        if call.options.max_tokens is not None:
            return sum(budgets)
        return sum(min(budget, self.config.default_output_reservation) for budget in budgets)

    def _deadline_s(self, call: GenerateCall, info: CallInfo) -> float | None:
        if call.priority is Priority.OFFLINE:
            return None
        return info.arrival_s + self.config.first_token_deadline_s

    async def _codec(self, model: ResolvedModel) -> TextCodec:
        try:
            return await self._codecs.get(model.base)
        except BadConfig as error:
            logger.exception("tokenizer of base %s cannot be loaded", model.base.base_model_id)
            raise LoraplexError(f"The tokenizer of '{model.base.base_model_id}' cannot be loaded.") from error

    async def _encode(self, codec: TextCodec, prompt: Prompt) -> tuple[int, ...]:
        """At least one token id. Raises InvalidInput."""
        if isinstance(prompt, TokenPrompt):
            check_token_ids(prompt.token_ids, codec.vocab_size, param="prompt")
            token_ids = prompt.token_ids
        elif isinstance(prompt, TextPrompt):
            check_text(prompt.text, param="prompt")
            if len(prompt.text) <= self.config.inline_tokenize_chars:
                token_ids = codec.encode(prompt.text)
            else:
                token_ids = await asyncio.to_thread(codec.encode, prompt.text)
        else:
            token_ids = await self._encode_chat(codec, prompt)
        if not token_ids:
            raise InvalidInput("The prompt is empty.", param="prompt")
        return token_ids

    async def _encode_chat(self, codec: TextCodec, prompt: ChatPrompt) -> tuple[int, ...]:
        messages = []
        for message in prompt.messages:
            check_text(message.content, param="messages")
            # Templates know the older name of the role.
            role = "system" if message.role == "developer" else message.role
            messages.append({"role": role, "content": message.content})
        if not messages:
            raise InvalidInput("At least one message is needed.", param="messages")
        if sum(len(message["content"]) for message in messages) <= self.config.inline_tokenize_chars:
            return codec.encode_chat(messages)
        return await asyncio.to_thread(codec.encode_chat, messages)
