"""Ports for what starts a moment later."""

import socket

import pytest
from loraplex_deployments import ports
from loraplex_deployments.ports import free_port, free_ports

# What Linux gives to connections unless told otherwise.
_EPHEMERAL = range(32_768, 61_000)


def test_they_differ_and_no_connection_is_given_one() -> None:
    drawn = free_ports(50)
    assert len(set(drawn)) == 50
    assert not set(drawn) & set(_EPHEMERAL)


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_port_somebody_listens_on_is_passed_over(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken, *free = sorted(free_ports(3))
    monkeypatch.setattr(ports, "_FIRST", taken)
    monkeypatch.setattr(ports, "_LAST", taken)
    with socket.create_server((host, taken)):
        with pytest.raises(OSError, match="no port"):
            free_port()
        monkeypatch.setattr(ports, "_LAST", free[-1])
        assert taken not in {free_port() for _ in range(20)}
    monkeypatch.setattr(ports, "_LAST", taken)
    assert free_port() == taken
