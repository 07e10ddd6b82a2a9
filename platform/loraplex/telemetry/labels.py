"""Keeps the number of values of a metric label bounded, whatever tenants do. Used by the metric owners."""


class LabelCap:
    """The first ``max_values`` distinct values keep their own label; later ones share ``other``."""

    OTHER = "other"

    def __init__(self, max_values: int) -> None:
        self._max_values = max_values
        self._seen: set[str] = set()

    def __call__(self, value: str) -> str:
        if value in self._seen:
            return value
        if len(self._seen) < self._max_values:
            self._seen.add(value)
            return value
        return self.OTHER
