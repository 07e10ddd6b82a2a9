"""An Executor without a network: the next token is a hash of what lies in the pages that the plan points to.

KV entries, adapters and page tables are all read back from a dictionary of pages, so a wrong page table, stale or
shared KV, or an adapter that was overwritten gives tokens that differ from ``expected_tokens``. Used by tests and by
capacity measurements that need an engine without its compute.
"""

import hashlib
import time
from collections.abc import Iterable

from loraplex.core.adapter import AdapterBlock, AdapterManifest
from loraplex.core.errors import BadAdapter
from loraplex.core.ids import BaseModelId, Digest
from loraplex.core.model import ModelSpec
from loraplex.core.request import EngineRequest
from loraplex.core.step import ArenaSpec, Row, RowStart, SampledToken, StepPlan, StepResult

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


class FakeExecutor:
    """Strict about the contract of ``core.step``: a plan that breaks it is an AssertionError, also kept in
    ``violations``.

    ``poisoned``: adapters whose rows raise, after the rows before them have run. ``unloadable``: adapters whose load
    raises. ``unstageable``: adapters whose staging raises BadAdapter.
    """

    def __init__(
        self,
        *,
        model: ModelSpec | None = None,
        num_pages: int = 64,
        page_size: int = 4,
        step_s: float = 0.0,
        stage_s: float = 0.0,
        poisoned: Iterable[str] = (),
        unloadable: Iterable[str] = (),
        unstageable: Iterable[str] = (),
    ) -> None:
        self._model = model or fake_model()
        self._arena = ArenaSpec(num_pages=num_pages, page_size=page_size, page_bytes=1024)
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
        self._result: StepResult | None = None
        self._failed = False
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
        return 1

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

    def load_adapter(self, digest: Digest, pages: tuple[int, ...], *, after_step: int = 0) -> None:
        assert digest in self._staged, f"adapter {digest} is not staged"
        assert digest not in self._loaded, f"adapter {digest} is loaded already"
        assert len(pages) == self._staged[digest], "wrong number of pages"
        if digest in self.unloadable:
            raise RuntimeError("the copy failed")
        for index, page in enumerate(pages):
            self._pages[page] = {0: (-1, index, _adapter_key(digest))}
        self._loaded[digest] = pages

    def drop_adapter(self, digest: Digest) -> None:
        del self._loaded[digest]

    def submit(self, plan: StepPlan) -> None:
        assert self._result is None, "a step was not collected"
        try:
            self._result = self._execute(plan)
        except AssertionError as error:
            self.violations.append(str(error))
            raise
        except RuntimeError:
            self._failed = True
            raise
        self._failed = False

    def collect(self) -> StepResult:
        result, self._result = self._result, None
        assert result is not None, "no step is in flight"
        return result

    def close(self) -> None:
        self.closed = True

    def _execute(self, plan: StepPlan) -> StepResult:
        assert not self.closed
        assert plan.step_id > self._step_id, "step ids must grow"
        assert [row.adapter or "" for row in plan.rows] == sorted(row.adapter or "" for row in plan.rows)
        self._step_id = plan.step_id
        for slot in plan.releases:
            # After a failed step its releases come again.
            assert slot in self._slots or self._failed, f"slot {slot} is not open"
            self._slots.pop(slot, None)
        for start in plan.starts:
            self._start(start)
        sampled = [token for row in plan.rows if (token := self._run(row)) is not None]
        time.sleep(self._step_s)
        return StepResult(step_id=plan.step_id, tokens=tuple(sampled), duration_s=self._step_s)

    def _start(self, start: RowStart) -> None:
        assert start.slot not in self._slots, f"slot {start.slot} is open already"
        assert 0 < start.num_prompt_tokens <= len(start.token_ids)
        self._slots[start.slot] = list(start.token_ids)

    def _run(self, row: Row) -> SampledToken | None:
        tokens, end, size = self._slots[row.slot], row.start + len(row.token_ids), self._arena.page_size
        assert row.token_ids == tuple(tokens[row.start : end]), "the row's tokens are not the slot's"
        assert row.samples == (end == len(tokens))
        assert len(set(row.pages)) == len(row.pages), "a page occurs twice in a page table"
        assert len(row.pages) * size >= end, "the page table is too short"
        if row.adapter in self.poisoned:
            raise RuntimeError("poisoned adapter")
        key = self._read_adapter(row.adapter)
        for position, token in enumerate(row.token_ids, row.start):
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
