"""The whole contract between engine (decides) and model_runner (computes): StepPlan in, StepResult out.

Row slots and pages are given out by the engine. A slot holds the sampling state of one running request inside the
executor, from the plan that starts it to the plan that releases it. Pages are units of one arena that holds KV and
adapters alike; the executor turns ids into addresses and never chooses one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from loraplex.core.adapter import AdapterManifest
from loraplex.core.ids import Digest
from loraplex.core.model import ModelSpec
from loraplex.core.request import SamplingParams, TokenLogprob

PENDING = -1
"""Stands in a row for the token that its slot samples in the step before, which is in flight: an executor with several
steps in flight reads it on the device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArenaSpec:
    """Geometry of the arena. ``page_bytes`` = KV bytes of ``page_size`` tokens over all layers, on the rank of a group
    where they are most; all ranks have the same pages."""

    num_pages: int
    page_size: int
    """Tokens of KV that one page holds."""
    page_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RowStart:
    """Opens a slot. Sent in the plan of the request's first row, and again after a preemption (with a new slot)."""

    slot: int
    sampling: SamplingParams
    token_ids: tuple[int, ...]
    """Prompt followed by all tokens generated so far."""
    num_prompt_tokens: int


class Row(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One request's share of a step: tokens [start, start + len(token_ids)) of its sequence.

    A struct for its speed: hundreds are made in each step.
    """

    slot: int
    token_ids: tuple[int, ...]
    """Decode: the one token sampled last, or PENDING while the step that samples it is in flight. Prefill: a chunk."""
    start: int
    """Position of the first token; KV of [0, start) lies in ``pages`` already."""
    pages: Sequence[int]
    """Page table: token position p lies in pages[p // page_size]; covers start + len(token_ids), and may hold more. The
    engine's own growing list: to be read in ``submit`` and not afterwards."""
    adapter: Digest | None
    samples: bool
    """True when the last token of the row is the last known token of the request: one token is drawn after it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """Applied in this order: releases, starts, rows."""

    step_id: int
    releases: tuple[int, ...]
    """Slots to close. One that is not open is ignored: a failed step is planned again with the same releases."""
    starts: tuple[RowStart, ...]
    rows: tuple[Row, ...]
    """Sorted by adapter (base rows first), so that each adapter's tokens are one segment."""

    @property
    def num_tokens(self) -> int:
        return sum(len(row.token_ids) for row in self.rows)


class SampledToken(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    slot: int
    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    step_id: int
    tokens: tuple[SampledToken, ...]
    """One for each row with ``samples``, in row order."""
    duration_s: float
    """From the start of the step on the device to its end."""


class Executor(Protocol):
    """Runs steps on one group, in the order in which they are submitted. Not thread-safe: ``submit``, ``collect``,
    ``load_adapter`` and ``drop_adapter`` are called by the engine loop only. ``stage_adapter`` and ``unstage_adapter``
    may be called from any thread."""

    @property
    def model(self) -> ModelSpec: ...

    @property
    def arena(self) -> ArenaSpec: ...

    @property
    def max_in_flight(self) -> int:
        """Steps that may be submitted and not collected: 1 where ``submit`` itself computes, 2 where the host can
        prepare a step while the device runs the one before, one a stage in a pipeline, or one more."""

    @property
    def num_stages(self) -> int:
        """Of the pipeline. A row may hold PENDING when the step that samples it is at least as many steps before, and
        steps take their share of the running so that every stage has one."""

    def check(self) -> None:
        """Raises ExecutorLost when a process that it runs on is gone or hangs, as every other method then does.
        Cheap: for the time in which nothing runs."""

    def adapter_pages(self, manifest: AdapterManifest) -> int:
        """Number of arena pages that the adapter takes. Pure."""

    def stage_adapter(self, manifest: AdapterManifest, path: str) -> None:
        """Read the safetensors file at ``path`` into the host tier, in arena layout (slow, any thread). Idempotent.

        Raises BadAdapter when the file does not match the manifest, NotFound when it is gone.
        """

    def unstage_adapter(self, digest: Digest) -> None:
        """Drop from the host tier. Any thread."""

    def load_adapter(self, digest: Digest, pages: tuple[int, ...]) -> None:
        """Copy a staged adapter into ``pages`` (length ``adapter_pages``), which no step in flight uses. May overlap
        steps: ordered before the next step that names the digest."""

    def drop_adapter(self, digest: Digest) -> None:
        """Forget the adapter's addresses; its pages are the engine's again. No step in flight names the digest."""

    def submit(self, plan: StepPlan) -> None:
        """Start a step; fewer than ``max_in_flight`` are under way. May return before it is done.

        When it raises nothing of the plan counts, and earlier steps stay in flight. The slots that the plan names are
        released and started anew before they are used again.
        """

    def collect(self) -> StepResult:
        """Block until the oldest step in flight is done, also when it samples nothing: its pages may have another owner
        at once.

        When it raises, that step and all later ones are void: the executor has forgotten them and touches no page.
        """

    def close(self) -> None:
        """Ends the executor; steps in flight have no result."""
