"""How a gateway hands generations to the router and reads their tokens back. Implemented by ``router``."""

from typing import Protocol

from loraplex.core.request import EngineRequest, RequestOutput


class TokenStream(Protocol):
    """Outputs of the generations of one ``dispatch`` call, merged in order of arrival."""

    async def next_outputs(self) -> tuple[RequestOutput, ...]:
        """Everything that arrived since the last call, at least one output; an empty tuple when all are finished.

        Raises ReplicaLost when the generations can go on nowhere.
        """

    def abort(self) -> None:
        """The caller gave up. Idempotent, does not block; unfinished generations stop within one engine step."""


class Dispatcher(Protocol):
    def dispatch(self, requests: tuple[EngineRequest, ...]) -> TokenStream:
        """Sends the generations of one client request (n of them) to one replica of their base.

        Raises Overloaded when no replica can take them in time, Unavailable when no replica serves the base.
        """
