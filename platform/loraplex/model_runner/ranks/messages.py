"""What a group's executor and its ranks say to each other: one message a step down, one up from the last stage.

Msgpack of array-like structs. ``commands`` is the connection that the rank's main thread reads, in order; ``events``
goes up only: beats, what became of a staging, why the rank ends.
"""

import msgspec

from loraplex.core.adapter import AdapterManifest
from loraplex.core.ids import BaseModelId, Digest
from loraplex.core.step import RowStart, SampledToken
from loraplex.model_runner.config import ExecutorConfig


class Hello(msgspec.Struct, frozen=True, array_like=True):
    """First on each connection of a rank."""

    rank: int
    events: bool


class RankJob(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank is told at its start; which one it is, it knows."""

    config: ExecutorConfig
    """With ``stage_layers`` and ``num_threads`` filled in."""
    model: str
    base_model_id: BaseModelId
    store_port: int
    """Of the rendezvous, on the host that the rank connected to."""


class Room(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Up: the weights are there; so many pages fit."""

    num_pages: int


class Ready(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Up: the arena is there."""


class StartFailed(msgspec.Struct, frozen=True, array_like=True, tag=True):
    code: str
    message: str


class Allocate(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Down: make an arena of so many pages, the same on all ranks."""

    num_pages: int


class Stage(msgspec.Struct, frozen=True, array_like=True, tag=True):
    request: int
    manifest: AdapterManifest
    path: str | None
    seed: int
    """Of made-up weights, where ``path`` is None."""


class Unstage(msgspec.Struct, frozen=True, array_like=True, tag=True):
    digest: Digest


class Load(msgspec.Struct, frozen=True, array_like=True, tag=True):
    digest: Digest
    number: int
    """Stands for the adapter in steps, until it is dropped."""
    pages: tuple[int, ...]
    """As many as the rank that needs most of them takes."""


class Drop(msgspec.Struct, frozen=True, array_like=True, tag=True):
    digest: Digest
    number: int


class Step(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A StepPlan without what the ranks know: made and read by ``step_codec``."""

    step_id: int
    releases: tuple[int, ...]
    starts: tuple[RowStart, ...]
    num_rows: int
    only_decodes: bool
    """Every row computes one token and draws the next."""
    values: list[int]
    """Columns of ``num_rows`` each: slots, positions, adapters and, unless ``only_decodes``, numbers of tokens and
    whether a token is drawn; then all tokens."""
    new_pages: list[int]
    """Of each row whose page table has grown: its place in the step, how many pages are new, these pages."""


class Ahead(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Down: the next step, to be prepared. Commands of its own thread wait until it has begun."""

    step: Step


class Begin(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Down: the step that came ahead runs now."""


Command = Allocate | Stage | Unstage | Load | Drop | Step | Ahead | Begin


class StepDone(msgspec.Struct, frozen=True, array_like=True):
    """Up, from the first shard of the last stage: by then no rank touches a page of the step any more."""

    step_id: int
    token_ids: list[int]
    """Of the rows that sample, in their order."""
    detailed: tuple[SampledToken, ...] = ()
    """The same with log-probabilities, if any row asked for them."""


class Beat(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Up, every second."""

    progress: int
    """Grows with every exchange of the rank (twice a layer, but for those in captured graphs) and with every step."""


class Staged(msgspec.Struct, frozen=True, array_like=True, tag=True):
    request: int
    code: str = ""
    """Of the error; empty: it lies in host memory."""
    message: str = ""


class Failed(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The rank ends: the group is lost."""

    message: str


Started = Room | Ready | StartFailed
Event = Beat | Staged | Failed
