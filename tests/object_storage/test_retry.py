"""Waits are bounded, grow, and are drawn; only what may pass is tried again."""

import errno
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loraplex.object_storage.retry import Retry, is_transient

AWAY = OSError("When reading: AWS Error NETWORK_CONNECTION during HeadObject operation: curlCode: 7")


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0
        self.waits_s: list[float] = []

    def sleep(self, wait_s: float) -> None:
        self.waits_s.append(wait_s)
        self.now_s += wait_s


@given(seed=st.integers(), total_s=st.floats(0.5, 60), first_s=st.floats(0.01, 1), takes_s=st.floats(0, 3))
def test_waits(seed: int, total_s: float, first_s: float, takes_s: float) -> None:
    clock, draw = Clock(), random.Random(seed)

    def attempt() -> None:
        clock.now_s += takes_s
        raise AWAY

    retry = Retry(total_s=total_s, first_s=first_s, max_s=4.0)
    with pytest.raises(OSError, match="NETWORK_CONNECTION"):
        retry.call(attempt, sleep=clock.sleep, now_s=lambda: clock.now_s, draw=draw.random)
    assert clock.now_s <= total_s + takes_s, "no attempt begins after the end"
    for number, wait_s in enumerate(clock.waits_s):
        longest_s = min(first_s * 2**number, max(4.0, first_s))
        assert longest_s / 2 <= wait_s <= longest_s
    assert sum(clock.waits_s) + (len(clock.waits_s) + 1) * (takes_s + 4.0) > total_s, "it did not give up early"


def test_two_callers_do_not_wait_alike() -> None:
    waits = []
    for seed in (1, 2):
        clock = Clock()
        with pytest.raises(OSError, match="NETWORK"):
            Retry(total_s=5).call(
                lambda: (_ for _ in ()).throw(AWAY),
                sleep=clock.sleep,
                now_s=lambda clock=clock: clock.now_s,  # type: ignore[misc]
                draw=random.Random(seed).random,
            )
        waits.append(clock.waits_s)
    assert waits[0] != waits[1]


def test_it_ends_with_success() -> None:
    clock, left = Clock(), [AWAY, AWAY]

    def attempt() -> str:
        if left:
            raise left.pop()
        return "there"

    assert Retry(total_s=5).call(attempt, sleep=clock.sleep, now_s=lambda: clock.now_s) == "there"
    assert len(clock.waits_s) == 2


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "no such file"),
        OSError(errno.ENOSPC, "no space left"),
        OSError("Couldn't deserialize thrift: TProtocolException"),
        OSError(
            "When getting information for key 'x' in bucket 'b': AWS Error ACCESS_DENIED during HeadObject operation"
        ),
        OSError("AWS Error NO_SUCH_BUCKET during CreateMultipartUpload operation: The specified bucket does not exist"),
    ],
)
def test_what_will_not_pass_is_not_tried_again(error: OSError) -> None:
    attempts = []

    def attempt() -> None:
        attempts.append(1)
        raise error

    assert not is_transient(error)
    with pytest.raises(OSError, match=r".") as caught:
        Retry(total_s=5).call(attempt)
    assert caught.value is error
    assert len(attempts) == 1
