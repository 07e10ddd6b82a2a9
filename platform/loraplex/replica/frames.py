"""Joins what could not be sent yet: outputs of one request into one, frames of one gateway into one.

Pure. Called by ``engine_loop`` and ``outbox``.
"""

from collections.abc import Iterable
from dataclasses import replace

from loraplex.core.ids import RequestId
from loraplex.core.request import RequestOutput
from loraplex.core.wire import LoadReport, ReplicaFrame


def merge_outputs(outputs: Iterable[RequestOutput]) -> tuple[RequestOutput, ...]:
    """At most one output per request, in the order in which the requests first appear."""
    by_request: dict[RequestId, list[RequestOutput]] = {}
    for output in outputs:
        by_request.setdefault(output.request_id, []).append(output)
    return tuple(parts[0] if len(parts) == 1 else _join(parts) for parts in by_request.values())


def merge_frames(frames: list[ReplicaFrame]) -> ReplicaFrame:
    """One frame that tells what ``frames`` (at least one, oldest first) tell together."""
    if len(frames) == 1:
        return frames[0]
    load: LoadReport | None = None
    for frame in frames:
        if frame.load is not None:
            resident = load.resident_adapters if load is not None else None
            load = frame.load
            if load.resident_adapters is None and resident is not None:
                load = replace(load, resident_adapters=resident)
    return ReplicaFrame(
        replica=next((frame.replica for frame in frames if frame.replica is not None), None),
        outputs=merge_outputs(output for frame in frames for output in frame.outputs),
        load=load,
    )


def _join(parts: list[RequestOutput]) -> RequestOutput:
    return RequestOutput(
        request_id=parts[0].request_id,
        tokens=tuple(token for part in parts for token in part.tokens),
        finish_reason=parts[-1].finish_reason,
        num_cached_tokens=parts[0].num_cached_tokens,
        error=parts[-1].error,
        error_code=parts[-1].error_code,
    )
