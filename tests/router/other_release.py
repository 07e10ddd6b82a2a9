"""One end of a replica link, run by a process of another release: ``replica`` prints its port and ends with its input;
``router PORT`` has requests served by the replica there. See ``test_releases_together``."""

import asyncio
import sys
from contextlib import AsyncExitStack

from loraplex.core.control import ReplicaRoute
from loraplex.core.ids import BaseModelId, ReplicaId
from loraplex.core.wire import GatewayFrame

from tests.router.replicas import SECRET, check, eventually, make_request, start_replica, start_router

ADAPTERS = (None, "a" * 64, "b" * 64)


async def be_replica() -> None:
    async with AsyncExitStack() as stack:
        replica = await start_replica(stack, "replica-0")
        print(replica.port, flush=True)
        await asyncio.to_thread(sys.stdin.read)


async def be_router(port: int) -> None:
    async with AsyncExitStack() as stack:
        await ask(stack, port, gateway="another")


async def ask(stack: AsyncExitStack, port: int, *, gateway: str) -> None:
    """Requests one after the other and together, whose tokens are checked; one that its client gives up."""
    router = start_router(stack, gateway=gateway)
    route = ReplicaRoute(
        replica_id=ReplicaId("replica-0"), base_model_id=BaseModelId("fake-base"), address=f"127.0.0.1:{port}"
    )
    router.update((route,), SECRET)
    await eventually(lambda: len(router.loads()) == 1)
    for adapter in ADAPTERS:
        await check(router, make_request(adapter=adapter))
    await asyncio.gather(*(check(router, make_request(adapter=ADAPTERS[i % 3], max_tokens=40)) for i in range(30)))
    router.dispatch((make_request(max_tokens=200),)).abort()
    await eventually(lambda: all(load.num_running == load.num_waiting == 0 for load in router.loads().values()))


if __name__ == "__main__":
    assert "of_the_future" in GatewayFrame.__dataclass_fields__, "this is not the other release"
    asyncio.run(be_replica() if sys.argv[1] == "replica" else be_router(int(sys.argv[2])))
