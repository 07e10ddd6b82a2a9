import asyncio

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from loraplex.core.ids import Digest, RequestId
from loraplex.core.request import FinishReason, OutputToken, RequestOutput
from loraplex.core.wire import LoadReport, ReplicaFrame
from loraplex.replica.frames import merge_frames
from loraplex.replica.outbox import Outbox


def output(name: str, *tokens: int, end: bool = False, cached: int = 0) -> RequestOutput:
    return RequestOutput(
        request_id=RequestId(name),
        tokens=tuple(OutputToken(token_id=token) for token in tokens),
        finish_reason=FinishReason.STOP if end else None,
        num_cached_tokens=cached,
    )


def frame(*outputs: RequestOutput, running: int = 0, resident: tuple[str, ...] | None = None) -> ReplicaFrame:
    digests = None if resident is None else tuple(map(Digest, resident))
    return ReplicaFrame(outputs=outputs, load=LoadReport(num_running=running, resident_adapters=digests))


@given(
    steps=st.lists(
        st.dictionaries(st.sampled_from("abc"), st.lists(st.integers(0, 9), max_size=3), max_size=3), min_size=1
    )
)
def test_merging_keeps_each_requests_tokens_in_order(steps: list[dict[str, list[int]]]) -> None:
    frames = [frame(*(output(name, *tokens) for name, tokens in step.items())) for step in steps]
    merged = merge_frames(frames)
    assert len({part.request_id for part in merged.outputs}) == len(merged.outputs)
    for part in merged.outputs:
        expected = [token for step in steps for token in step.get(part.request_id, [])]
        assert [token.token_id for token in part.tokens] == expected


def test_merging_keeps_the_first_cached_count_the_last_reason_and_the_newest_load() -> None:
    merged = merge_frames(
        [
            frame(output("a", 1, cached=7), running=1, resident=("x",)),
            frame(output("b", 5), running=2),
            frame(output("a", 2, end=True), running=3),
        ]
    )
    first = merged.outputs[0]
    assert (first.num_cached_tokens, first.finish_reason, len(first.tokens)) == (7, FinishReason.STOP, 2)
    assert merged.load is not None
    assert merged.load.num_running == 3
    # "Unchanged" means unchanged since what was merged away.
    assert merged.load.resident_adapters == ("x",)


async def test_the_outbox_hands_over_all_that_waits_at_once() -> None:
    outbox = Outbox(max_unsent_tokens=100)
    taking = asyncio.create_task(outbox.take())
    await asyncio.sleep(0)
    outbox.put(frame(output("a", 1)))
    outbox.put(frame(output("a", 2)))
    taken = await taking
    assert taken is not None
    assert [token.token_id for token in taken.outputs[0].tokens] == [1, 2]
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(outbox.take(), 0.01)


async def test_a_gateway_that_takes_nothing_is_cut_off() -> None:
    outbox = Outbox(max_unsent_tokens=10)
    for i in range(11):
        outbox.put(frame(output("a", i)))
    assert await outbox.take() is None


async def test_what_waits_is_sent_before_the_end() -> None:
    outbox = Outbox(max_unsent_tokens=10)
    outbox.put(frame(output("a", 1)))
    outbox.end()
    outbox.put(frame(output("a", 2)))
    taken = await outbox.take()
    assert taken is not None
    assert len(taken.outputs[0].tokens) == 1
    assert await outbox.take() is None


def test_load_reports_do_not_pile_up() -> None:
    outbox = Outbox(max_unsent_tokens=10)
    for i in range(100):
        outbox.put(frame(running=i))
    assert len(outbox._frames) == 1


def test_an_error_that_is_merged_with_tokens_keeps_its_kind() -> None:
    failed = msgspec.structs.replace(
        output("a"), finish_reason=FinishReason.ERROR, error="away", error_code="unavailable"
    )
    (merged,) = merge_frames([frame(output("a", 1)), frame(failed)]).outputs
    assert (merged.error, merged.error_code, len(merged.tokens)) == ("away", "unavailable", 1)
