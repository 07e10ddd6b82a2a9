"""The engine's mutable record of one request: its tokens, pages, slot and progress. Owned by the scheduler."""

from loraplex.core.ids import Digest, RequestId, TenantName
from loraplex.core.request import EngineRequest, FinishReason, Priority


class Sequence:
    """KV of tokens [0, num_computed) lies in ``pages``; a request without a slot holds no pages.

    Steps in flight will compute [num_computed, num_scheduled) and sample the tokens [len(token_ids), num_known).
    """

    __slots__ = (
        "adapter",
        "awaited_key",
        "charged_tokens",
        "emitted",
        "end_reason",
        "last_step",
        "max_tokens_total",
        "needs_start",
        "num_cached",
        "num_computed",
        "num_in_flight",
        "num_known",
        "num_prompt",
        "num_scheduled",
        "num_sealed",
        "offline",
        "page_keys",
        "pages",
        "rank",
        "request",
        "request_id",
        "since_s",
        "slot",
        "stop_ids",
        "tenant",
        "token_ids",
    )

    def __init__(
        self,
        request: EngineRequest,
        *,
        order: int,
        now_s: float,
        max_tokens_total: int,
        eos_token_ids: tuple[int, ...] = (),
    ) -> None:
        self.request = request
        self.request_id: RequestId = request.request_id
        self.tenant: TenantName = request.tenant
        self.adapter: Digest | None = request.adapter.digest if request.adapter is not None else None
        self.offline = request.priority is Priority.OFFLINE
        self.rank = (self.offline, request.arrival_s, order)
        """Total order of the running: whose rank is greatest gives way first."""
        self.token_ids = [*request.prompt_token_ids, *request.resumed_token_ids]
        self.num_prompt = len(request.prompt_token_ids)
        self.max_tokens_total = max_tokens_total
        """Prompt + output at most."""
        sampling = request.sampling
        self.stop_ids = frozenset((*sampling.stop_token_ids, *(() if sampling.ignore_eos else eos_token_ids)))
        """Tokens that end it once ``min_tokens`` are generated."""
        self.num_computed = 0
        self.num_scheduled = 0
        self.num_known = len(self.token_ids)
        self.num_in_flight = 0
        """Steps in flight that hold a row of it."""
        self.last_step = 0
        """Number of the last step that was planned with a row of it."""
        self.num_cached: int | None = None
        """Prompt tokens found in the prefix cache at the first admission."""
        self.pages: list[int] = []
        """Rows of steps show this very list: it grows at its end, and is never cut or reused."""
        self.page_keys: list[bytes] = []
        self.awaited_key: bytes | None = None
        """Of the page that it last waited for; see ``PrefixCache.awaited``."""
        self.num_sealed = 0
        """Leading pages that are already offered to the prefix cache."""
        self.slot: int | None = None
        self.needs_start = False
        self.since_s = now_s
        """When it became ready to be admitted; minus infinity after a preemption."""
        self.charged_tokens = 0
        """Positions whose prefill the tenant has paid for before it was preempted."""
        self.emitted = False
        self.end_reason: FinishReason | None = None
        """Set when its last output went out; it may still be in a step in flight."""

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.num_prompt

    @property
    def num_uncomputed(self) -> int:
        return len(self.token_ids) - self.num_computed

    @property
    def num_unscheduled(self) -> int:
        """Tokens that the next step may compute, the pending one too."""
        return self.num_known - self.num_scheduled

    @property
    def row_order(self) -> tuple[str, tuple[bool, float, int]]:
        """Of its rows in a step."""
        return self.adapter or "", self.rank

    def validate(self, page_size: int) -> None:
        """Of a running request; raises AssertionError on a broken invariant."""
        assert 0 <= self.num_computed < len(self.token_ids)
        assert self.num_computed <= self.num_scheduled < self.num_known <= self.max_tokens_total
        assert self.num_scheduled <= len(self.pages) * page_size
        assert self.num_sealed <= self.num_computed // page_size
