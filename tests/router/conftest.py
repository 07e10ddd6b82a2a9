"""A router with one scripted replica; and what a test's replicas, routers and wires are closed by."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from tests.router.scripted import World


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World("a")
    yield world
    await world.router.close()


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack
