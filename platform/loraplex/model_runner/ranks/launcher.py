"""How the processes of a group start: the same for local processes and for actors of a cluster."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from loraplex.core.adapter import AdapterManifest

OpenAdapter = Callable[[AdapterManifest, str], AbstractContextManager[str]]
"""An adapter, and the path of its file on the machine of the group's executor -> the path of the file on this machine,
where it stays meanwhile. Any thread; blocks. Raises LoraplexErrors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankStart:
    """All that a process needs to become a rank: ``worker.run_rank`` takes it from there."""

    rank: int
    address: tuple[str, int]
    """Where the group's executor listens."""
    key: bytes
    """Opens a connection to it; to be kept from others."""
    device_index: int | None = None
    """Of the rank's GPU among those that the process sees; None: the GPUs of the group stand in the order of its
    ranks."""


class RankProcess(Protocol):
    def ended(self) -> str | None:
        """How it ended, in a few words; None while it runs. Does not wait."""

    def kill(self) -> None:
        """At once, whatever it does. Idempotent."""


class RankLauncher(Protocol):
    @property
    def host(self) -> str:
        """This machine's address as the ranks reach it."""

    def launch(self, start: RankStart) -> RankProcess:
        """Starts a process that calls ``run_rank(start)``; does not wait for it. Ranks of a stage share a machine."""
