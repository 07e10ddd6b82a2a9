"""Our values as ``loraplex.v1`` messages and back. Pure; used by ``grpc_api``."""

from loraplex.core.control import AdapterView
from loraplex.gateway.call import SamplingOptions
from loraplex.gateway.choice import ChoiceDelta
from loraplex.gateway.directory import ResolvedModel
from loraplex.gateway.generation import Generation
from loraplex.gateway.proto import loraplex_v1_pb2 as pb
from loraplex.gateway.tokenizer import TextCodec

_FINISH = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
}

_SCALARS = (
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "min_tokens",
    "seed",
)


def sampling_options(options: pb.SamplingOptions) -> SamplingOptions:
    """Fields that are not set become None, which takes the default."""
    scalars = {name: getattr(options, name) for name in _SCALARS if options.HasField(name)}
    return SamplingOptions(
        **scalars,
        n=options.n if options.HasField("n") else 1,
        logit_bias={str(token_id): bias for token_id, bias in options.logit_bias.items()},
        ignore_eos=options.ignore_eos,
        stop=tuple(options.stop),
        stop_token_ids=tuple(options.stop_token_ids),
        num_logprobs=options.logprobs if options.HasField("logprobs") else None,
    )


def delta_message(generation: Generation, delta: ChoiceDelta) -> pb.ChoiceDelta:
    message = pb.ChoiceDelta(
        index=delta.index,
        text=delta.text,
        token_ids=[token.token_id for token in delta.tokens],
        finish_reason=_FINISH[delta.finish_reason],
    )
    if generation.num_logprobs is not None:
        _add_logprobs(message, generation.codec, delta)
    return message


def model_message(model: ResolvedModel) -> pb.Model:
    adapter = model.adapter
    return pb.Model(
        id=model.model_id,
        base_model=model.base.base_model_id,
        version=None if adapter is None else adapter.ref.version,
        digest=None if adapter is None else adapter.ref.digest,
        max_context_tokens=model.base.max_context_tokens,
        created_s=model.base.created_s if adapter is None else adapter.created_s,
    )


def adapter_message(adapter: AdapterView) -> pb.Adapter:
    ref = adapter.ref
    return pb.Adapter(
        name=ref.name,
        version=ref.version,
        digest=ref.digest,
        base_model=adapter.base_model_id,
        lora_rank=adapter.max_lora_rank,
        num_bytes=adapter.num_bytes,
        created_s=adapter.created_s,
        current=adapter.current,
    )


def _add_logprobs(message: pb.ChoiceDelta, codec: TextCodec, delta: ChoiceDelta) -> None:
    for token in delta.tokens:
        message.logprobs.append(
            pb.Token(
                token_id=token.token_id,
                logprob=token.logprob,
                top_logprobs=[
                    pb.TokenLogprob(token_id=top.token_id, token=codec.token_bytes(top.token_id), logprob=top.logprob)
                    for top in token.top_logprobs
                ],
            )
        )
