"""Rows for the trace tests."""

from collections.abc import Callable

import pytest
from loraplex.traces.row import TraceRow


@pytest.fixture
def make_row() -> Callable[..., TraceRow]:
    def make(index: int = 0, **changes: object) -> TraceRow:
        values: dict[str, object] = {
            "arrival_s": 1_700_000_000.0 + index,
            "tenant": f"tenant-{index % 2}",
            "request_id": f"request-{index:06d}",
            "endpoint": "chat.completions",
            "base_model_id": "smollm2-135m-instruct",
            "adapter_name": "pirate" if index % 3 else None,
            "adapter_version": 1 if index % 3 else None,
            "adapter_digest": "ab" * 32 if index % 3 else None,
            "prompt_tokens": 10 + index,
            "cached_tokens": 0,
            "output_tokens": 20,
            "ttft_s": 0.1,
            "e2e_s": 2.0,
            "tpot_s": 0.1,
            "status": 200,
            "finish_reason": "stop",
            "replica_id": "replica-0",
            "stream": True,
        }
        return TraceRow(**{**values, **changes})  # type: ignore[arg-type]

    return make
