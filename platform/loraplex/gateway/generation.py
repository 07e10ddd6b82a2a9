"""A running generation: outputs of its token streams become deltas of its choices, and it is accounted for at the end.

Made by ``GatewayService.generate``, drained by the HTTP and gRPC fronts. Knows no protocol.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from loraplex.core.errors import LoraplexError, error_from_code
from loraplex.core.generation import TokenStream
from loraplex.core.ids import ReplicaId, RequestId
from loraplex.core.request import FinishReason, RequestOutput
from loraplex.gateway.choice import Choice, ChoiceDelta
from loraplex.gateway.merge import LocatedStream, MergedStream
from loraplex.gateway.status import HTTP_CLIENT_GONE, HTTP_OK, status_of
from loraplex.gateway.tokenizer import TextCodec


class Closable(Protocol):
    """The part of ``Account`` that a generation calls."""

    def first_token(self) -> None: ...

    def close(
        self,
        *,
        status: int,
        finish_reason: str | None = None,
        output_tokens: int = 0,
        cached_tokens: int = 0,
        replica_id: ReplicaId | None = None,
    ) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    prompt_tokens: int
    """Of all prompts, each counted once however many choices it has."""
    cached_tokens: int
    """Part of ``prompt_tokens``."""
    completion_tokens: int


class Generation:
    """Deltas in order of arrival. Ends by exhaustion, by an error, or by ``abort``; each closes the account once."""

    def __init__(
        self,
        *,
        streams: TokenStream | MergedStream,
        choices: Mapping[RequestId, Choice],
        prompts: tuple[str, ...],
        prompt_tokens: int,
        account: Closable,
        codec: TextCodec,
        num_logprobs: int | None,
    ) -> None:
        """``choices``: one for each dispatched request, in order of index. ``prompts``: their texts, only when they are
        to be echoed."""
        self._stream = streams
        self._choices = dict(choices)
        self._by_index = tuple(self._choices.values())
        self._account = account
        self._num_open = len(self._choices)
        self._prompt_tokens = prompt_tokens
        self._done = False
        self._saw_token = False
        self._prompts = prompts
        self.codec = codec
        self.num_logprobs = num_logprobs

    @property
    def num_choices(self) -> int:
        return len(self._choices)

    @property
    def ended(self) -> bool:
        """True once no delta will follow those handed out."""
        return self._done

    def echo_text(self, choice_index: int) -> str:
        """The prompt that goes before the text of a choice; empty unless echo was asked for."""
        return self._prompts[self._by_index[choice_index].prompt_index] if self._prompts else ""

    @property
    def usage(self) -> Usage:
        """What was counted so far."""
        cached: dict[int, int] = {}
        for choice in self._by_index:
            cached.setdefault(choice.prompt_index, choice.num_cached_tokens)
        return Usage(
            prompt_tokens=self._prompt_tokens,
            cached_tokens=sum(cached.values()),
            completion_tokens=sum(choice.num_tokens for choice in self._by_index),
        )

    async def next_deltas(self) -> list[ChoiceDelta]:
        """What arrived since the last call; an empty list once all choices are finished.

        Raises the LoraplexError that ended the generation; it is accounted for, ``abort`` does no harm afterwards.
        """
        try:
            while not self._done:
                outputs = await self._stream.next_outputs()
                if not outputs:
                    raise LoraplexError("The generation ended before its last token.")
                deltas = self._apply(outputs)
                if self._num_open == 0:
                    self._finish()
                if deltas:
                    return deltas
        except Exception as error:
            self._close(status_of(error).http, "error")
            self._stream.abort()
            raise
        return []

    def abort(self) -> None:
        """The client is gone, or the front failed. No effect on a generation that has ended."""
        if not self._done:
            self._close(HTTP_CLIENT_GONE, "abort")
            self._stream.abort()

    def _apply(self, outputs: tuple[RequestOutput, ...]) -> list[ChoiceDelta]:
        deltas: list[ChoiceDelta] = []
        for output in outputs:
            choice = self._choices[output.request_id]
            if choice.finish_reason is not None:
                continue
            reason = output.finish_reason
            if reason is FinishReason.ERROR:
                raise error_from_code(
                    output.error_code or "generation_failed", output.error or "The generation failed."
                )
            if reason is FinishReason.ABORT:
                raise LoraplexError("The generation was stopped by the server.", code="generation_aborted")
            if not self._saw_token and output.tokens:
                self._saw_token = True
                self._account.first_token()
            delta, still_running = choice.take(output)
            deltas.append(delta)
            if delta.finish_reason is not None:
                self._num_open -= 1
                if still_running:
                    self._stop_engine(choice)
        return deltas

    def _stop_engine(self, choice: Choice) -> None:
        if isinstance(self._stream, MergedStream):
            self._stream.abort_one(choice.index)
        else:
            self._stream.abort()

    def _finish(self) -> None:
        self._close(HTTP_OK, self._by_index[0].finish_reason)
        if isinstance(self._stream, MergedStream):
            self._stream.abort()

    def _close(self, status: int, finish_reason: str | None) -> None:
        if self._done:
            return
        self._done = True
        usage = self.usage
        self._account.close(
            status=status,
            finish_reason=finish_reason,
            output_tokens=usage.completion_tokens,
            cached_tokens=usage.cached_tokens,
            replica_id=self._stream.replica_id if isinstance(self._stream, LocatedStream) else None,
        )
