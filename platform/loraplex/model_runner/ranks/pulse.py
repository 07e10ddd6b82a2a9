"""Whether the ranks of a group are well, by what they said and when. Pure: the time comes with each call."""


class Pulse:
    def __init__(self, num_ranks: int, *, timeout_s: float, now_s: float) -> None:
        """``timeout_s``: how long a rank may be silent, and a step without progress."""
        self._timeout_s = timeout_s
        self._heard_s = [now_s] * num_ranks
        self._progress = [-1] * num_ranks
        self._progress_s = now_s

    def beat(self, rank: int, progress: int, now_s: float) -> None:
        """Changes state."""
        self._heard_s[rank] = now_s
        if progress != self._progress[rank]:
            self._progress[rank] = progress
            self._progress_s = now_s

    def trouble(self, now_s: float, *, busy_since_s: float | None) -> str | None:
        """What is wrong; None when nothing is. ``busy_since_s``: since when steps are in flight, None: none is.

        Ranks wait for each other, so it is enough that one of them gets on.
        """
        for rank, heard_s in enumerate(self._heard_s):
            if now_s - heard_s > self._timeout_s:
                return f"rank {rank} has been silent for {now_s - heard_s:.1f} s"
        if busy_since_s is not None:
            stalled_s = now_s - max(busy_since_s, self._progress_s)
            if stalled_s > self._timeout_s:
                return f"a step has made no progress for {stalled_s:.1f} s"
        return None
