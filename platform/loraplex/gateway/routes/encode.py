"""Generations as OpenAI JSON: whole replies, and stream chunks of which all but the text is encoded in advance.

The chunk encoders run once per choice and engine step; everything that stays the same is a prefix built per choice.
"""

import secrets
import time
from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from loraplex.core.request import OutputToken
from loraplex.gateway.choice import ChoiceDelta
from loraplex.gateway.generation import Generation, Usage
from loraplex.gateway.tokenizer import TextCodec

_json = msgspec.json.encode
_FINISH = {None: b"null", "stop": b'"stop"', "length": b'"length"'}
_LOWEST_LOGPROB = -9999.0
"""JSON has no infinity; a token of probability 0 is written as this."""

DONE = b"data: [DONE]\n\n"


class ChunkEncoder(Protocol):
    """Makes the events of one stream."""

    def chunk(self, delta: ChoiceDelta) -> bytes:
        """One whole ``data:`` event."""

    def usage(self, usage: Usage) -> bytes:
        """The event with the usage, after all chunks."""


def usage_reply(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


class _Envelope:
    """The parts of a stream that never change."""

    def __init__(self, *, id_prefix: str, object_name: str, model: str, include_usage: bool) -> None:
        head = _json(
            {
                "id": id_prefix + secrets.token_hex(12),
                "object": object_name,
                "created": int(time.time()),
                "model": model,
            }
        )
        self.open = b"data: " + head[:-1] + b',"choices":['
        self.close = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"

    def usage(self, usage: Usage) -> bytes:
        return self.open + b'],"usage":' + _json(usage_reply(usage)) + b"}\n\n"


class ChatChunks:
    """``chat.completion.chunk`` events. The role comes with the first event of each choice."""

    def __init__(self, generation: Generation, *, model: str, include_usage: bool) -> None:
        envelope = _Envelope(
            id_prefix="chatcmpl-",
            object_name="chat.completion.chunk",
            model=model,
            include_usage=include_usage,
        )
        self.usage = envelope.usage
        self._heads = [envelope.open + b'{"index":%d,"delta":{' % index for index in range(generation.num_choices)]
        self._close = envelope.close
        self._seen = [False] * generation.num_choices
        self._codec = generation.codec
        self._wants_logprobs = generation.num_logprobs is not None

    def chunk(self, delta: ChoiceDelta) -> bytes:
        index = delta.index
        if not self._seen[index]:
            self._seen[index] = True
            content = b'"role":"assistant","content":' + _json(delta.text)
        elif delta.text:
            content = b'"content":' + _json(delta.text)
        else:
            content = b""
        logprobs = b"null"
        if self._wants_logprobs and delta.tokens:
            logprobs = _json(chat_logprobs(self._codec, delta.tokens))
        return b"".join(
            (
                self._heads[index],
                content,
                b'},"logprobs":',
                logprobs,
                b',"finish_reason":',
                _FINISH[delta.finish_reason],
                b"}",
                self._close,
            )
        )


class CompletionChunks:
    """``text_completion`` events. An echoed prompt comes with the first event of each choice."""

    def __init__(self, generation: Generation, *, model: str, include_usage: bool) -> None:
        envelope = _Envelope(
            id_prefix="cmpl-",
            object_name="text_completion",
            model=model,
            include_usage=include_usage,
        )
        self.usage = envelope.usage
        self._heads = [envelope.open + b'{"index":%d,"text":' % index for index in range(generation.num_choices)]
        self._close = envelope.close
        self._generation = generation
        self._offsets: list[int | None] = [None] * generation.num_choices

    def chunk(self, delta: ChoiceDelta) -> bytes:
        index, text = delta.index, delta.text
        offset = self._offsets[index]
        if offset is None:
            offset = 0
            text = self._generation.echo_text(index) + text
        self._offsets[index] = offset + len(text)
        logprobs = b"null"
        if self._generation.num_logprobs is not None and delta.tokens:
            logprobs = _json(completion_logprobs(self._generation, delta.tokens, offset))
        return b"".join(
            (
                self._heads[index],
                _json(text),
                b',"logprobs":',
                logprobs,
                b',"finish_reason":',
                _FINISH[delta.finish_reason],
                b"}",
                self._close,
            )
        )


def chat_reply(generation: Generation, deltas: Sequence[Sequence[ChoiceDelta]], *, model: str) -> bytes:
    """``deltas``: per choice, in order."""
    choices = []
    for index, own in enumerate(deltas):
        logprobs = None
        if generation.num_logprobs is not None:
            logprobs = chat_logprobs(generation.codec, [token for delta in own for token in delta.tokens])
        choices.append(
            {
                "index": index,
                "message": {"role": "assistant", "content": "".join(d.text for d in own), "refusal": None},
                "logprobs": logprobs,
                "finish_reason": own[-1].finish_reason,
            }
        )
    return _reply("chatcmpl-", "chat.completion", generation, choices, model)


def completion_reply(generation: Generation, deltas: Sequence[Sequence[ChoiceDelta]], *, model: str) -> bytes:
    """``deltas``: per choice, in order."""
    choices = []
    for index, own in enumerate(deltas):
        echo = generation.echo_text(index)
        logprobs = None
        if generation.num_logprobs is not None:
            tokens = [token for delta in own for token in delta.tokens]
            logprobs = completion_logprobs(generation, tokens, len(echo))
        choices.append(
            {
                "index": index,
                "text": echo + "".join(d.text for d in own),
                "logprobs": logprobs,
                "finish_reason": own[-1].finish_reason,
            }
        )
    return _reply("cmpl-", "text_completion", generation, choices, model)


def chat_logprobs(codec: TextCodec, tokens: Sequence[OutputToken]) -> dict[str, Any]:
    def entry(token_id: int, logprob: float | None) -> dict[str, Any]:
        spelled = codec.token_bytes(token_id)
        return {"token": _text(spelled), "logprob": _finite(logprob), "bytes": list(spelled)}

    content = [
        entry(token.token_id, token.logprob)
        | {"top_logprobs": [entry(top.token_id, top.logprob) for top in token.top_logprobs]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(generation: Generation, tokens: Sequence[OutputToken], offset: int) -> dict[str, Any]:
    """``offset``: characters of the choice's text before the first of ``tokens``."""
    codec = generation.codec
    texts = [_text(codec.token_bytes(token.token_id)) for token in tokens]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    top = None
    if generation.num_logprobs:
        top = [
            {_text(codec.token_bytes(entry.token_id)): _finite(entry.logprob) for entry in token.top_logprobs}
            for token in tokens
        ]
    return {
        "tokens": texts,
        "token_logprobs": [_finite(token.logprob) for token in tokens],
        "top_logprobs": top,
        "text_offset": offsets,
    }


def _reply(
    id_prefix: str, object_name: str, generation: Generation, choices: list[dict[str, Any]], model: str
) -> bytes:
    return _json(
        {
            "id": id_prefix + secrets.token_hex(12),
            "object": object_name,
            "created": int(time.time()),
            "model": model,
            "choices": choices,
            "usage": usage_reply(generation.usage),
        }
    )


def _text(spelled: bytes) -> str:
    return spelled.decode("utf-8", "replace")


def _finite(logprob: float | None) -> float:
    return _LOWEST_LOGPROB if logprob is None else max(logprob, _LOWEST_LOGPROB)
