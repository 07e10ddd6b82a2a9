"""Ports for what starts a moment later, beside everything else on this machine."""

import contextlib
import random
import socket

# Below the ephemeral ports of Linux (32768 to 60999), which the kernel gives to any connection and to Ray's own servers
# while ours still start, and between those of Ray's workers (10002 to 19999) and of Serve's ingress (30000 to 31000).
_FIRST, _LAST = 20_000, 29_999
_ATTEMPTS = 100
_random = random.SystemRandom()  # two processes with the same seed must not draw the same ports


def free_ports(count: int) -> list[int]:
    """Distinct ports on which nobody listens at any address of this machine, at this moment. Raises OSError."""
    with contextlib.ExitStack() as held:
        return [_bound(held) for _ in range(count)]


def free_port() -> int:
    """One of them."""
    return free_ports(1)[0]


def _bound(held: contextlib.ExitStack) -> int:
    for _ in range(_ATTEMPTS):
        probe = held.enter_context(socket.socket())
        port = _random.randint(_FIRST, _LAST)
        with contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    raise OSError(f"no port from {_FIRST} to {_LAST} is free")
