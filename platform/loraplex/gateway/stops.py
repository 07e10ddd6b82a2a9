"""Stop strings over text that arrives in pieces. Pure; one matcher per choice, fed by ``Choice``."""

from collections.abc import Sequence


class StopMatcher:
    """Emits text up to the first stop string and holds back what may be the beginning of one.

    The match that completes first wins, and among those that complete with the same character the longest: so the
    result depends on the text alone, never on how it was cut into pieces.
    """

    __slots__ = ("_held", "_stops")

    def __init__(self, stops: Sequence[str]) -> None:
        """``stops``: at least one, none empty."""
        assert stops
        assert all(stops)
        self._stops = tuple(stops)
        self._held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """(text that is safe to send, whether a stop string was hit). After a hit nothing more may be fed."""
        if not text:
            return "", False
        buffer = self._held + text
        hit: tuple[int, int] | None = None
        for stop in self._stops:
            start = buffer.find(stop)
            if start >= 0 and (hit is None or (start + len(stop), start) < hit):
                hit = (start + len(stop), start)
        if hit is not None:
            self._held = ""
            return buffer[: hit[1]], True
        held = max(self._longest_overlap(buffer, stop) for stop in self._stops)
        cut = len(buffer) - held
        self._held = buffer[cut:]
        return buffer[:cut], False

    def flush(self) -> str:
        """What was held back, once it is known that nothing follows."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _longest_overlap(buffer: str, stop: str) -> int:
        """Length of the longest proper prefix of ``stop`` that ``buffer`` ends with."""
        for size in range(min(len(stop) - 1, len(buffer)), 0, -1):
            if buffer.endswith(stop[:size]):
                return size
        return 0
