"""Several streams read as one."""

import pytest
from loraplex.core.errors import ReplicaLost
from loraplex.core.ids import RequestId
from loraplex.core.request import RequestOutput
from loraplex.gateway.merge import MergedStream


class Stream:
    def __init__(self, name: str, count: int, *, fails: bool = False) -> None:
        self.outputs = [RequestOutput(request_id=RequestId(name)) for _ in range(count)]
        self.fails = fails
        self.aborted = 0

    async def next_outputs(self) -> tuple[RequestOutput, ...]:
        if self.outputs:
            return (self.outputs.pop(),)
        if self.fails:
            raise ReplicaLost("gone")
        return ()

    def abort(self) -> None:
        self.aborted += 1


async def drain(merged: MergedStream) -> list[str]:
    names = []
    while outputs := await merged.next_outputs():
        names += [str(output.request_id) for output in outputs]
    return names


async def test_all_outputs_then_the_end() -> None:
    merged = MergedStream([Stream("a", 3), Stream("b", 0), Stream("c", 1)])
    assert sorted(await drain(merged)) == ["a", "a", "a", "c"]
    assert await merged.next_outputs() == ()


async def test_error_of_one_ends_all() -> None:
    streams = [Stream("a", 2, fails=True), Stream("b", 0)]
    merged = MergedStream(streams)
    with pytest.raises(ReplicaLost):
        await drain(merged)
    assert all(stream.aborted for stream in streams)


async def test_abort_one_leaves_the_others() -> None:
    streams = [Stream("a", 1), Stream("b", 1)]
    merged = MergedStream(streams)
    merged.abort_one(1)
    assert [stream.aborted for stream in streams] == [0, 1]
    merged.abort()
    assert await merged.next_outputs() == ()
