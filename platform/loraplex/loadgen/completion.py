"""One streamed completion: what is sent, what comes back when. Called by both runners."""

import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import msgspec

from loraplex.core.errors import BadConfig
from loraplex.loadgen.config import Endpoint, RequestConfig
from loraplex.loadgen.http_client import ConnectFailed, ConnectionBroken, HttpClient
from loraplex.loadgen.http_parser import SseParser
from loraplex.loadgen.prompts import Prompt
from loraplex.loadgen.targets import Target


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = msgspec.field(default_factory=list)
    usage: _Usage | None = None
    error: Any = None


class _ErrorDetail(msgspec.Struct):
    message: str = ""


class _ErrorBody(msgspec.Struct):
    error: _ErrorDetail


_decode_chunk = msgspec.json.Decoder(_Chunk).decode
_decode_error = msgspec.json.Decoder(_ErrorBody).decode
_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One request as the client saw it. Times are seconds since the start of the run."""

    target: Target
    scheduled_s: float
    """When it should have been sent; every latency counts from here."""
    sent_s: float
    first_token_s: float | None
    end_s: float
    prompt_tokens: int
    """As the server counted; as asked for when it does not say."""
    output_tokens: int
    gaps_s: tuple[float, ...]
    """Between chunks with text."""
    text: str
    """The answer, as far as it came."""
    error: str | None
    """None for a complete answer; else the HTTP status, or one of ``timeout``, ``connect``, ``broken``, ``stream``."""
    message: str
    """What the server or the system said of the error."""


class _Listener:
    """Reads one event stream and notes when its tokens came."""

    def __init__(self) -> None:
        self.times_s: list[float] = []
        self.pieces: list[str] = []
        self.finished_s: float | None = None
        self.usage: _Usage | None = None
        self.problem: str | None = None
        self.done = False
        self._parser = SseParser()

    def on_body(self, body: bytes) -> None:
        now_s = time.perf_counter()
        for event in self._parser.feed(body):
            if event == b"[DONE]":
                self.done = True
                continue
            try:
                chunk = _decode_chunk(event)
            except msgspec.DecodeError as error:
                self.problem = f"not a completion chunk: {error}"
                continue
            if chunk.error is not None:
                self.problem = _encode(chunk.error).decode()
            if chunk.usage is not None:
                self.usage = chunk.usage
            for choice in chunk.choices:
                if text := choice.text or (choice.delta and choice.delta.content):
                    self.times_s.append(now_s)
                    self.pieces.append(text)
                if choice.finish_reason is not None:
                    self.finished_s = now_s


class CompletionClient:
    """Sends completions to one server and times them."""

    def __init__(self, http: HttpClient, config: RequestConfig) -> None:
        self._http = http
        self._config = config

    def encode(self, target: Target, prompt: Prompt, output_tokens: int) -> bytes:
        """The request's bytes; made before its time comes. Raises BadConfig for a chat of token ids."""
        body: dict[str, Any] = {
            "model": target.model,
            "max_tokens": output_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self._config.endpoint is Endpoint.CHAT:
            if not isinstance(prompt, str):
                raise BadConfig("chat messages are text; token ids go to the endpoint completions", param="endpoint")
            body["messages"] = [{"role": "user", "content": prompt}]
        else:
            body["prompt"] = prompt
        if self._config.ignore_eos:
            body["ignore_eos"] = True
        headers = {"content-type": "application/json", "accept": "text/event-stream"}
        if target.key is not None:
            headers["authorization"] = f"Bearer {target.key}"
        return self._http.encode_post(self._config.endpoint.path, headers, _encode(body))

    async def run(
        self, data: bytes, *, target: Target, origin_s: float, scheduled_s: float, prompt_tokens: int
    ) -> Sample:
        """Never raises for what the server or network does: that is the sample's error.

        ``origin_s``: time.perf_counter() at the start of the run.
        """
        listener = _Listener()
        sent_s = time.perf_counter()
        error: str | None = None
        message = ""
        try:
            answer = await self._http.send(data, listener.on_body, timeout_s=self._config.timeout_s)
        except TimeoutError:
            error, message = "timeout", f"no end within {self._config.timeout_s} s"
        except ConnectFailed as failure:
            error, message = "connect", str(failure)
        except ConnectionBroken as failure:
            error, message = "broken", str(failure)
        else:
            if answer.status != 200:
                error, message = str(answer.status), _error_message(answer.error_body)
            elif listener.problem is not None:
                error, message = "stream", listener.problem
            elif not listener.done:
                error, message = "broken", "the stream ended without [DONE]"
        end_s = time.perf_counter()
        times_s = listener.times_s
        first_s = times_s[0] if times_s else listener.finished_s
        usage = listener.usage
        return Sample(
            target=target,
            scheduled_s=scheduled_s,
            sent_s=sent_s - origin_s,
            first_token_s=None if first_s is None else first_s - origin_s,
            end_s=end_s - origin_s,
            prompt_tokens=usage.prompt_tokens if usage is not None else prompt_tokens,
            output_tokens=usage.completion_tokens if usage is not None else len(times_s),
            gaps_s=tuple(after - before for before, after in pairwise(times_s)),
            text="".join(listener.pieces),
            error=error,
            message=message,
        )


def _error_message(body: bytes) -> str:
    try:
        return _decode_error(body).error.message
    except msgspec.DecodeError:
        return body[:200].decode("utf-8", "replace")
