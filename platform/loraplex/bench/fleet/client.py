"""Requests through a gateway's own router to the replicas of a fleet: a ``loadgen.open_loop.Client`` without HTTP.

Called by ``measure``.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from loraplex.core.adapter import AdapterRef
from loraplex.core.errors import LoraplexError
from loraplex.core.ids import BaseModelId, Digest, RequestId, TenantName
from loraplex.core.request import EngineRequest, FinishReason, SamplingParams
from loraplex.loadgen.completion import Sample
from loraplex.loadgen.prompts import Prompt
from loraplex.loadgen.schedule import PlannedRequest
from loraplex.loadgen.targets import Target
from loraplex.router.router import Router
from loraplex.traces.arrivals import Arrivals


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbered:
    """A request and its row."""

    row: int
    request: EngineRequest


class RouterClient:
    """For one run of a schedule: the n-th request encoded is row n of ``arrivals``."""

    def __init__(self, router: Router, arrivals: Arrivals, digests: Sequence[Digest], *, run: str) -> None:
        """``digests``: of ``arrivals.adapters``; ``run``: in the ids of the requests, which no two runs share."""
        self._router = router
        self._arrivals = arrivals
        self._digests = digests
        self._run = run
        self._rows: Iterator[int] = iter(range(len(arrivals)))
        self.samples: dict[int, Sample] = {}
        """By row, once they have ended."""

    def schedule(self) -> list[PlannedRequest]:
        arrivals = self._arrivals
        return [
            PlannedRequest(
                index=row,
                at_s=float(arrivals.arrival_s[row]),
                target=Target(tenant=self._tenant(row), model=self._base(row), key=None),
                prompt_tokens=int(arrivals.prompt_tokens[row]),
                output_tokens=int(arrivals.output_tokens[row]),
            )
            for row in range(len(arrivals))
        ]

    def encode(self, target: Target, prompt: Prompt, output_tokens: int) -> Numbered:
        assert not isinstance(prompt, str), "the router takes token ids"
        row = next(self._rows)
        adapter = int(self._arrivals.adapter[row])
        tenant = TenantName(target.tenant)
        ref = None
        if adapter >= 0:
            name = self._arrivals.adapters[adapter].name
            ref = AdapterRef(tenant=tenant, name=name, version=1, digest=self._digests[adapter])
        request = EngineRequest(
            request_id=RequestId(f"{self._run}-{row}"),
            tenant=tenant,
            base_model_id=BaseModelId(target.model),
            adapter=ref,
            prompt_token_ids=tuple(prompt),
            sampling=SamplingParams(max_tokens=output_tokens, seed=0, temperature=0.0, ignore_eos=True),
            arrival_s=0.0,
            # No two share KV: traces do not tell equal prompts.
            cache_salt=f"{self._run}-{row}",
        )
        return Numbered(row=row, request=request)

    async def run(
        self, data: Numbered, *, target: Target, origin_s: float, scheduled_s: float, prompt_tokens: int
    ) -> Sample:
        sent_s = time.perf_counter()
        first_s: float | None = None
        error: str | None = None
        message, num_tokens = "", 0
        try:
            stream = self._router.dispatch((data.request,))
            while outputs := await stream.next_outputs():
                now_s = time.perf_counter()
                for output in outputs:
                    if output.tokens and first_s is None:
                        first_s = now_s
                    num_tokens += len(output.tokens)
                    if output.finish_reason is FinishReason.ERROR:
                        error, message = output.error_code or "error", output.error or ""
        except LoraplexError as failure:
            error, message = failure.code, failure.message
        sample = self.samples[data.row] = Sample(
            target=target,
            scheduled_s=scheduled_s,
            sent_s=sent_s - origin_s,
            first_token_s=None if first_s is None else first_s - origin_s,
            end_s=time.perf_counter() - origin_s,
            prompt_tokens=prompt_tokens,
            output_tokens=num_tokens,
            gaps_s=(),
            text="",
            error=error,
            message=message,
        )
        return sample

    def _tenant(self, row: int) -> str:
        return self._arrivals.tenants[int(self._arrivals.tenant[row])]

    def _base(self, row: int) -> str:
        return self._arrivals.base_models[int(self._arrivals.base_model[row])]
