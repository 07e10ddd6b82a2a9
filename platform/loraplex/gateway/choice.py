"""One choice of a request: engine tokens in, text that may be sent out. No I/O; owned by ``Generation``."""

from dataclasses import dataclass

from loraplex.core.request import FinishReason, OutputToken, RequestOutput
from loraplex.gateway.stops import StopMatcher
from loraplex.gateway.tokenizer import Detokenizer

_FINISH = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}


@dataclass(slots=True, kw_only=True)
class ChoiceDelta:
    """What one engine step adds to one choice. Never changed once handed out."""

    index: int
    text: str
    tokens: tuple[OutputToken, ...]
    """The tokens behind the text; with a character or stop string in the making they arrive before their text."""
    finish_reason: str | None
    """``stop`` or ``length``, on the last delta only."""
    num_tokens: int
    """Output tokens of the choice so far."""


class Choice:
    """State of one choice."""

    __slots__ = (
        "_detokenizer",
        "_matcher",
        "_min_tokens",
        "_stop_token_ids",
        "finish_reason",
        "index",
        "num_cached_tokens",
        "num_tokens",
        "prompt_index",
    )

    def __init__(
        self,
        *,
        index: int,
        prompt_index: int,
        detokenizer: Detokenizer,
        stops: tuple[str, ...],
        stop_token_ids: tuple[int, ...],
        min_tokens: int,
    ) -> None:
        """``min_tokens``: text that is complete before this many tokens is not searched for stop strings."""
        self.index = index
        self.prompt_index = prompt_index
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self.finish_reason: str | None = None
        self._detokenizer = detokenizer
        self._matcher = StopMatcher(stops) if stops else None
        self._stop_token_ids = frozenset(stop_token_ids)
        self._min_tokens = min_tokens

    def take(self, output: RequestOutput) -> tuple[ChoiceDelta, bool]:
        """(delta, whether a stop string ended the choice while the engine still runs it).

        ``output`` must not carry FinishReason.ABORT or ERROR, and the choice must not be finished.
        """
        if output.num_cached_tokens:
            self.num_cached_tokens = output.num_cached_tokens
        tokens = output.tokens
        pieces: list[str] = []
        hit = False
        for position, token in enumerate(tokens):
            self.num_tokens += 1
            if self._is_silent_stop(output, position):
                continue
            piece = self._detokenizer.feed(token.token_id)
            if self._matcher is not None and self.num_tokens >= self._min_tokens:
                piece, hit = self._matcher.feed(piece)
            pieces.append(piece)
            if hit:
                tokens = tokens[: position + 1]
                break
        if hit:
            self.finish_reason = "stop"
        elif output.finish_reason is not None:
            self.finish_reason = _FINISH[output.finish_reason]
            if self._matcher is not None:
                pieces.append(self._matcher.flush())
        delta = ChoiceDelta(
            index=self.index,
            text=pieces[0] if len(pieces) == 1 else "".join(pieces),
            tokens=tokens,
            finish_reason=self.finish_reason,
            num_tokens=self.num_tokens,
        )
        return delta, hit and output.finish_reason is None

    def _is_silent_stop(self, output: RequestOutput, position: int) -> bool:
        """A stop token that ended the choice is counted but has no text."""
        return (
            output.finish_reason is FinishReason.STOP
            and position == len(output.tokens) - 1
            and output.tokens[position].token_id in self._stop_token_ids
        )
