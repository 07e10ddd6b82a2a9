"""Turns a client's options into the engine's SamplingParams, or says exactly which field is wrong. Pure."""

import math
import secrets
from collections.abc import Sequence

from loraplex.core.errors import ContextTooLong, InvalidInput
from loraplex.core.request import SamplingParams
from loraplex.gateway.call import ChatPrompt, GenerateCall, SamplingOptions
from loraplex.gateway.config import GatewayConfig

_SEED_MASK = 2**63 - 1
_MAX_LOGIT_BIAS_ENTRIES = 1024
_MAX_STOP_TOKENS = 128


def check_text(text: str, *, param: str) -> str:
    """``text`` itself. InvalidInput for lone surrogates, which JSON can spell and UTF-8 cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise InvalidInput(f"'{param}' is not valid Unicode text.", param=param) from None
    return text


def check_call(call: GenerateCall, config: GatewayConfig) -> None:
    """What can be said before the model is known: counts and ranges. Raises InvalidInput."""
    options = call.options
    _integer("n", options.n, 1, config.max_n)
    if not call.prompts:
        raise InvalidInput("At least one prompt is needed.", param="prompt")
    if len(call.prompts) > config.max_prompts:
        raise InvalidInput(f"At most {config.max_prompts} prompts in one request.", param="prompt")
    if len(call.prompts) * options.n > config.max_choices:
        raise InvalidInput(f"Prompts times n must not exceed {config.max_choices}.", param="n")
    _number("temperature", options.temperature, 0.0, 2.0)
    _number("top_p", options.top_p, 0.0, 1.0, low_open=True)
    _number("min_p", options.min_p, 0.0, 1.0)
    _number("presence_penalty", options.presence_penalty, -2.0, 2.0)
    _number("frequency_penalty", options.frequency_penalty, -2.0, 2.0)
    _number("repetition_penalty", options.repetition_penalty, 0.0, 10.0, low_open=True)
    _integer("max_tokens", options.max_tokens, 1, 2**31 - 1)
    _integer("min_tokens", options.min_tokens, 0, 2**31 - 1)
    _integer("top_k", options.top_k, -1, 2**31 - 1)
    _integer("seed", options.seed, -(2**63), 2**64 - 1)
    _integer("logprobs", options.num_logprobs, 0, call.max_logprobs)
    if len(options.stop) > config.max_stop_strings:
        raise InvalidInput(f"At most {config.max_stop_strings} stop strings.", param="stop")
    for stop in options.stop:
        if not 0 < len(stop) <= config.max_stop_chars:
            raise InvalidInput(f"A stop string has 1 to {config.max_stop_chars} characters.", param="stop")
        check_text(stop, param="stop")
    if call.echo and options.num_logprobs is not None:
        raise InvalidInput("'echo' together with 'logprobs' is not supported.", param="echo")


def check_token_ids(token_ids: Sequence[int], vocab_size: int, *, param: str) -> None:
    """Raises InvalidInput for an id outside [0, vocab_size)."""
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise InvalidInput(f"Token id {token_id} is outside the vocabulary of {vocab_size}.", param=param)


def check_num_biases(count: int) -> None:
    """Raises InvalidInput for more entries in ``logit_bias`` than one request may have."""
    if count > _MAX_LOGIT_BIAS_ENTRIES:
        raise InvalidInput(f"At most {_MAX_LOGIT_BIAS_ENTRIES} entries in 'logit_bias'.", param="logit_bias")


def output_budget(call: GenerateCall, *, num_prompt_tokens: int, max_context_tokens: int) -> int:
    """Output tokens that one choice may have. Raises ContextTooLong when prompt and output do not fit the context."""
    left = max_context_tokens - num_prompt_tokens
    asked = call.options.max_tokens
    if left < 1 or (asked is not None and asked > left):
        wanted = f" and {asked} output tokens were asked for" if asked is not None else ""
        raise ContextTooLong(
            f"The context holds {max_context_tokens} tokens; the prompt has {num_prompt_tokens}{wanted}.",
            param="messages" if isinstance(call.prompts[0], ChatPrompt) else "prompt",
        )
    if asked is not None:
        return asked
    return left if call.default_max_tokens is None else min(left, call.default_max_tokens)


def base_seed(options: SamplingOptions) -> int:
    """The client's seed folded into [0, 2**63), or a fresh one."""
    return secrets.randbits(63) if options.seed is None else options.seed & _SEED_MASK


def sampling_params(options: SamplingOptions, *, max_tokens: int, seed: int, vocab_size: int) -> SamplingParams:
    """Checked options as the engine takes them. Raises InvalidInput for token ids outside the vocabulary."""
    check_token_ids(options.stop_token_ids, vocab_size, param="stop_token_ids")
    if len(options.stop_token_ids) > _MAX_STOP_TOKENS:
        raise InvalidInput(f"At most {_MAX_STOP_TOKENS} stop tokens.", param="stop_token_ids")
    min_tokens = options.min_tokens or 0
    if min_tokens > max_tokens:
        raise InvalidInput(f"'min_tokens' is {min_tokens}, above 'max_tokens', {max_tokens}.", param="min_tokens")
    return SamplingParams(
        max_tokens=max_tokens,
        seed=seed & _SEED_MASK,
        temperature=_or(options.temperature, 1.0),
        top_p=_or(options.top_p, 1.0),
        top_k=max(0, options.top_k or 0),
        min_p=_or(options.min_p, 0.0),
        presence_penalty=_or(options.presence_penalty, 0.0),
        frequency_penalty=_or(options.frequency_penalty, 0.0),
        repetition_penalty=_or(options.repetition_penalty, 1.0),
        logit_bias=_logit_bias(options, vocab_size),
        min_tokens=min_tokens,
        ignore_eos=options.ignore_eos,
        stop_token_ids=tuple(dict.fromkeys(options.stop_token_ids)),
        num_logprobs=options.num_logprobs,
    )


def _logit_bias(options: SamplingOptions, vocab_size: int) -> tuple[tuple[int, float], ...]:
    check_num_biases(len(options.logit_bias))
    pairs: dict[int, float] = {}
    for key, bias in options.logit_bias.items():
        if not (key.isascii() and key.isdecimal() and len(key) <= 10):
            raise InvalidInput(f"'logit_bias' maps token ids to numbers; {key!r} is not one.", param="logit_bias")
        _number("logit_bias", bias, -100.0, 100.0)
        pairs[int(key)] = float(bias)
    check_token_ids(tuple(pairs), vocab_size, param="logit_bias")
    return tuple(sorted(pairs.items()))


def _or(value: float | None, default: float) -> float:
    return default if value is None else float(value)


def _number(name: str, value: float | None, low: float, high: float, *, low_open: bool = False) -> None:
    if value is None:
        return
    if not math.isfinite(value) or not low <= value <= high or (low_open and value == low):
        bracket = "(" if low_open else "["
        raise InvalidInput(f"'{name}' must lie in {bracket}{low:g}, {high:g}].", param=name)


def _integer(name: str, value: int | None, low: int, high: int) -> None:
    if value is not None and not low <= value <= high:
        raise InvalidInput(f"'{name}' must be an integer from {low} to {high}.", param=name)
