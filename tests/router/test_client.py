"""How what waits to be sent to a replica is cut into frames."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st
from loraplex.core.ids import RequestId
from loraplex.core.request import EngineRequest
from loraplex.core.wire import GatewayFrame, encode
from loraplex.router.client import frames_of

from tests.router.scripted import make

ID = 2**31 - 1
FRAME_BYTES = 6 << 20


def request(num_prompt: int, num_resumed: int, num_biases: int) -> EngineRequest:
    whole = make(prompt=(ID,) * num_prompt, adapter="a")
    sampling = replace(whole.sampling, logit_bias=((ID, -0.1),) * num_biases, stop_token_ids=(ID,) * 128)
    return replace(whole, resumed_token_ids=(ID,) * num_resumed, sampling=sampling)


def few_to_many(most: int) -> st.SearchStrategy[int]:
    return st.sampled_from([0, most // 3, most])


@given(
    sizes=st.lists(
        st.tuples(few_to_many(1_500_000).map(lambda n: n or 1), few_to_many(600_000), few_to_many(1024)), max_size=8
    ),
    num_aborts=st.integers(0, 2),
)
def test_frames_hold_all_in_order_and_only_a_lone_request_makes_a_large_one(
    sizes: list[tuple[int, int, int]], num_aborts: int
) -> None:
    submits = tuple(request(*size) for size in sizes)
    aborts = tuple(RequestId(f"a{number}") for number in range(num_aborts))
    frames = list(frames_of(submits, aborts))
    assert tuple(found for frame in frames for found in frame.submits) == submits
    assert [frame.aborts for frame in frames] == [()] * (len(frames) - 1) + [aborts]
    assert all(len(frame.submits) == 1 or len(encode(frame)) <= FRAME_BYTES for frame in frames)


def test_short_requests_share_a_frame() -> None:
    submits = tuple(request(1000, 0, 0) for _ in range(100))
    assert list(frames_of(submits, ())) == [GatewayFrame(submits=submits)]


def test_many_short_requests_make_no_large_frame() -> None:
    submits = tuple(request(1, 0, 1024) for _ in range(1000))
    assert max(len(encode(frame)) for frame in frames_of(submits, ())) <= FRAME_BYTES
