"""An Executor without a network: the next token is a hash of what lies in the pages that the plan points to.

KV entries, adapters and page tables are all read back from a dictionary of pages, so a wrong page table, stale or
shared KV, or an adapter that was overwritten gives tokens that differ from ``expected_tokens``. A step is computed when
it is collected, so what the engine changes too early while it is in flight shows. Used by tests and by capacity
measurements that need an engine without its compute.
"""

import hashlib
import time
from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import msgspec

from loraplex.core.adapter import AdapterBlock, AdapterManifest
from loraplex.core.errors import BadAdapter
from loraplex.core.ids import BaseModelId, Digest
from loraplex.core.model import ModelSpec
from loraplex.core.request import EngineRequest
from loraplex.core.step import PENDING, ArenaSpec, Row, RowStart, SampledToken, StepPlan, StepResult

PAGE_BYTES = 1024

_Cell = tuple[int, int, int]
"""What one token leaves behind: (position, token id, key of the adapter that computed it)."""


def fake_model(
    *,
    base_model_id: str = "fake-base",
    vocab_size: int = 1000,
    max_context_tokens: int = 512,
    eos_token_ids: tuple[int, ...] = (),
) -> ModelSpec:
    return ModelSpec(
        base_model_id=BaseModelId(base_model_id),
        family="llama",
        hidden_size=8,
        intermediate_size=16,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        vocab_size=vocab_size,
        max_context_tokens=max_context_tokens,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        eos_token_ids=eos_token_ids,
    )


def fake_manifest(digest: str, *, lora_rank: int = 8, base_model_id: str = "fake-base") -> AdapterManifest:
    """An adapter of one block; the FakeExecutor gives it ``lora_rank / 8`` pages, rounded up."""
    block = AdapterBlock(layer=0, module="q_proj", lora_rank=lora_rank, scale=1.0)
    return AdapterManifest(
        digest=Digest(digest), base_model_id=BaseModelId(base_model_id), blocks=(block,), num_bytes=64 * lora_rank
    )


def expected_tokens(request: EngineRequest, count: int, *, vocab_size: int = 1000) -> tuple[int, ...]:
    """The first ``count`` tokens that a correct engine generates for ``request``, whatever else it runs."""
    key = _adapter_key(request.adapter.digest if request.adapter is not None else None)
    cells = [(position, token, key) for position, token in enumerate(request.prompt_token_ids)]
    generated: list[int] = []
    for _ in range(count):
        generated.append(_next_token(cells, vocab_size))
        cells.append((len(cells), generated[-1], key))
    return tuple(generated)


def _adapter_key(digest: Digest | None) -> int:
    if digest is None:
        return 0
    return int.from_bytes(hashlib.sha256(digest.encode()).digest()[:7], "big")


def _next_token(cells: Iterable[_Cell], vocab_size: int) -> int:
    # Hashes of tuples of integers do not depend on the process's hash seed.
    return hash(tuple(cells)) % vocab_size


@dataclass(frozen=True, slots=True, kw_only=True)
class _Submitted:
    plan: StepPlan
    rows: tuple[Row, ...]
    """With page tables as they were when the step was submitted."""
    done_s: float


class FakeExecutor:
    """Strict about the contract of ``core.step``: a plan that breaks it is an AssertionError, also kept in
    ``violations``.

    Steps take ``step_s`` each, one after the other; ``max_in_flight`` of them may be submitted, with ``num_stages``
    greater than 1 with a pending token only when the step that draws it is at least as many steps before.
    ``poisoned``: adapters whose rows raise, in ``submit`` or in ``collect`` (after the rows before them have run).
    ``unloadable``: adapters whose load raises. ``unstageable``: adapters whose staging raises BadAdapter.
    ``fails_once_in``: the next such call raises.
    """

    def __init__(
        self,
        *,
        model: ModelSpec | None = None,
        num_pages: int = 64,
        page_size: int = 4,
        step_s: float = 0.0,
        stage_s: float = 0.0,
        max_in_flight: int = 1,
        num_stages: int = 1,
        poisoned: Iterable[str] = (),
        raises_in: Literal["submit", "collect"] = "collect",
        unloadable: Iterable[str] = (),
        unstageable: Iterable[str] = (),
    ) -> None:
        self._model = model or fake_model()
        self._arena = ArenaSpec(num_pages=num_pages, page_size=page_size, page_bytes=PAGE_BYTES)
        self._step_s = step_s
        self._stage_s = stage_s
        self.poisoned = frozenset(map(Digest, poisoned))
        self.unloadable = frozenset(map(Digest, unloadable))
        self.unstageable = frozenset(map(Digest, unstageable))
        self._pages: list[dict[int, _Cell]] = [{} for _ in range(num_pages)]
        self._slots: dict[int, list[int]] = {}
        self._staged: dict[Digest, int] = {}
        self._loaded: dict[Digest, tuple[int, ...]] = {}
        self._step_id = 0
        self._max_in_flight = max_in_flight
        self._num_stages = num_stages
        self._raises_in = raises_in
        self.fails_once_in: Literal["submit", "collect"] | None = None
        self._in_flight: deque[_Submitted] = deque()
        self._void_slots: set[int] = set()
        """Slots of failed steps: they are released again whether they are open or not."""
        self.violations: list[str] = []
        self.closed = False

    @property
    def model(self) -> ModelSpec:
        return self._model

    @property
    def arena(self) -> ArenaSpec:
        return self._arena

    @property
    def max_in_flight(self) -> int:
        return self._max_in_flight

    @property
    def num_stages(self) -> int:
        return self._num_stages

    def check(self) -> None:
        """It is always well."""

    @property
    def staged(self) -> frozenset[Digest]:
        return frozenset(self._staged)

    @property
    def loaded(self) -> frozenset[Digest]:
        return frozenset(self._loaded)

    def adapter_pages(self, manifest: AdapterManifest) -> int:
        return -(-manifest.max_lora_rank // 8)

    def stage_adapter(self, manifest: AdapterManifest, path: str) -> None:
        time.sleep(self._stage_s)
        if manifest.digest in self.unstageable:
            raise BadAdapter(f"adapter file {path} does not match its manifest")
        self._staged[manifest.digest] = self.adapter_pages(manifest)

    def unstage_adapter(self, digest: Digest) -> None:
        self._staged.pop(digest, None)

    def load_adapter(self, digest: Digest, pages: tuple[int, ...]) -> None:
        assert digest in self._staged, f"adapter {digest} is not staged"
        assert digest not in self._loaded, f"adapter {digest} is loaded already"
        assert len(pages) == self._staged[digest], "wrong number of pages"
        self._check(
            not set(pages) & set(self._users_in_flight()), "an adapter is loaded over pages of a step in flight"
        )
        if digest in self.unloadable:
            raise RuntimeError("the copy failed")
        for index, page in enumerate(pages):
            self._pages[page] = {0: (-1, index, _adapter_key(digest))}
        self._loaded[digest] = pages

    def drop_adapter(self, digest: Digest) -> None:
        in_flight = {row.adapter for step in self._in_flight for row in step.rows}
        self._check(digest not in in_flight, "an adapter is dropped that a step in flight names")
        del self._loaded[digest]

    def prepare(self, plan: StepPlan) -> None:
        """``submit`` does everything."""

    def submit(self, plan: StepPlan) -> None:
        self._check(len(self._in_flight) < self._max_in_flight, "too many steps in flight")
        self._check(not self.closed, "the executor is closed")
        self._check_plan(plan)
        try:
            self._raise_if_failing("submit", plan.rows)
        except RuntimeError:
            self._void(plan)
            raise
        # As an executor would that uploads its page tables here and reads nothing of the plan afterwards.
        rows = tuple(msgspec.structs.replace(row, pages=tuple(row.pages)) for row in plan.rows)
        started_s = max(time.monotonic(), self._in_flight[-1].done_s if self._in_flight else 0.0)
        self._in_flight.append(_Submitted(plan=plan, rows=rows, done_s=started_s + self._step_s))

    def collect(self) -> StepResult:
        assert self._in_flight, "no step is in flight"
        step = self._in_flight[0]
        time.sleep(max(0.0, step.done_s - time.monotonic()))
        try:
            tokens = self._compute(step)
        except RuntimeError:
            for void in self._in_flight:
                self._void(void.plan)
            self._in_flight.clear()
            raise
        except AssertionError as error:
            self.violations.append(str(error))
            raise
        self._in_flight.popleft()
        return StepResult(step_id=step.plan.step_id, tokens=tokens, duration_s=self._step_s)

    def close(self) -> None:
        self.closed = True

    def _check(self, holds: bool, violation: str) -> None:
        if not holds:
            self.violations.append(violation)
            raise AssertionError(violation)

    def _check_plan(self, plan: StepPlan) -> None:
        check, size = self._check, self._arena.page_size
        check(plan.step_id > self._step_id, "step ids must grow")
        self._step_id = plan.step_id
        adapters = [row.adapter or "" for row in plan.rows]
        check(adapters == sorted(adapters), "rows are not sorted by adapter")
        slots = [row.slot for row in plan.rows]
        check(len(set(slots)) == len(slots), "a slot has two rows")
        in_flight = {row.slot for step in self._in_flight for row in step.rows}
        check(not in_flight & set(plan.releases), "a slot is released that a step in flight uses")
        check(not in_flight & {start.slot for start in plan.starts}, "a slot is opened that a step in flight uses")
        # Of each slot in flight its last row: how many steps before, and whether it samples.
        last = {
            row.slot: (before, row.samples)
            for before, step in zip(range(len(self._in_flight), 0, -1), self._in_flight, strict=True)
            for row in step.rows
        }
        users = self._users_in_flight()
        for row in plan.rows:
            end = row.start + len(row.token_ids)
            check(len(set(row.pages)) == len(row.pages), "a page occurs twice in a page table")
            check(len(row.pages) * size >= end, "the page table is too short")
            check(PENDING not in row.token_ids or row.token_ids == (PENDING,), "a pending token in a chunk")
            if PENDING in row.token_ids:
                before, samples = last.get(row.slot, (0, False))
                check(samples, "no step samples the pending token")
                check(before >= self._num_stages, "a pending token between stages")
            written = {row.pages[position // size] for position in range(row.start, end)}
            check(all(users[page] <= {row.slot} for page in written), "a page of a step in flight is written")

    def _users_in_flight(self) -> defaultdict[int, set[int]]:
        """Pages that steps in flight read or write, and the slots for which they do."""
        users: defaultdict[int, set[int]] = defaultdict(set)
        for step in self._in_flight:
            for row in step.rows:
                adapter = () if row.adapter is None else self._loaded[row.adapter]
                for page in (*row.pages, *adapter):
                    users[page].add(row.slot)
        return users

    def _raise_if_failing(self, call: str, rows: Iterable[Row]) -> None:
        if self.fails_once_in == call:
            self.fails_once_in = None
            raise RuntimeError("a passing failure")
        if call == self._raises_in and any(row.adapter in self.poisoned for row in rows):
            raise RuntimeError("poisoned adapter")

    def _void(self, plan: StepPlan) -> None:
        self._void_slots.update(plan.releases, (row.slot for row in plan.rows))

    def _compute(self, step: "_Submitted") -> tuple[SampledToken, ...]:
        for slot in step.plan.releases:
            assert slot in self._slots or slot in self._void_slots, f"slot {slot} is not open"
            self._slots.pop(slot, None)
            self._void_slots.discard(slot)
        for start in step.plan.starts:
            self._start(start)
        return tuple(token for row in step.rows if (token := self._run(row)) is not None)

    def _start(self, start: RowStart) -> None:
        assert start.slot not in self._slots, f"slot {start.slot} is open already"
        assert 0 < start.num_prompt_tokens <= len(start.token_ids)
        self._slots[start.slot] = list(start.token_ids)

    def _run(self, row: Row) -> SampledToken | None:
        tokens, end, size = self._slots[row.slot], row.start + len(row.token_ids), self._arena.page_size
        token_ids = tuple(tokens[row.start : end])
        assert row.token_ids in (token_ids, (PENDING,)), "the row's tokens are not the slot's"
        assert len(token_ids) == len(row.token_ids), "the pending token was not sampled"
        assert row.samples == (end == len(tokens))
        self._raise_if_failing("collect", (row,))
        key = self._read_adapter(row.adapter)
        for position, token in enumerate(token_ids, row.start):
            page = self._pages[row.pages[position // size]]
            if position % size == 0:
                page.clear()
            page[position % size] = (position, token, key)
        if not row.samples:
            return None
        cells = [self._pages[row.pages[p // size]].get(p % size, (p, -1, -1)) for p in range(end)]
        token_id = _next_token(cells, self._model.vocab_size)
        tokens.append(token_id)
        return SampledToken(slot=row.slot, token_id=token_id)

    def _read_adapter(self, digest: Digest | None) -> int:
        """The adapter's key as its pages hold it; another number when they were overwritten."""
        if digest is None:
            return 0
        pages = self._loaded[digest]
        cells = {(-1, index, _adapter_key(digest)) for index in range(len(pages))}
        found = {self._pages[page].get(0, (0, 0, 0)) for page in pages}
        return _adapter_key(digest) if found == cells else -1
