"""The environment that Serve's proxy is chosen by, and what becomes of Serve's haproxy.cfg."""

import json
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPResponse
from pathlib import Path

import pytest
from loraplex.config.platform import PlatformConfig, parse_platform_config
from loraplex.core.errors import BadConfig, Conflict
from loraplex_deployments import proxy
from loraplex_deployments.haproxy_exec import adapted
from loraplex_deployments.ports import free_port
from loraplex_deployments.proxy import ServeProxy

SERVE_CFG = """defaults
    option abortonclose
    option splice-request
    option splice-response
    errorfile 502 /tmp/x/500.http
    errorfile 503 /tmp/x/500.http
frontend prometheus
    bind :9101
    mode http
frontend http_frontend
    bind *:8000
    default_backend default_backend
backend default_backend
    http-request return status 404 content-type text/plain lf-string "Path '%[path]' not found."
listen stats
  bind *:8404
  stats enable
"""


def config(root: Path, kind: str = "haproxy", *, address: str = "local", more: str = "") -> PlatformConfig:
    text = f"""
base_models: [{{id: a, model: 'random:tiny-llama'}}]
data_dir: {root}
serve: {{proxy: {kind}, gateways: 2{more}}}
ray: {{address: '{address}'}}
"""
    return parse_platform_config(text, source="test")


@pytest.fixture(autouse=True)
def serve_not_imported(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delitem(sys.modules, "ray.serve._private.constants", raising=False)
    before = serve_variables()
    yield
    assert serve_variables() == before


def test_a_local_haproxy_has_files_and_ports_of_its_own(tmp_path: Path) -> None:
    first, second = ServeProxy(config(tmp_path / "1")), ServeProxy(config(tmp_path / "2"))
    with closing(first), closing(second):
        paths = [value for name, value in first.variables.items() if name.endswith(("_PATH", "_LOC", "_FILE", "_BASE"))]
        folder = (tmp_path / "1" / "haproxy").resolve()
        assert sum(path.startswith(str(folder)) for path in paths) == 5
        assert folder.stat().st_mode & 0o777 == 0o700
        # Serve puts a node id of 56 characters between the folder and a socket's name, haproxy .PID.tmp behind it.
        assert len(f"{folder}/{56 * 'n'}/prometheus.sock.1234567.tmp") < 108
        shared = {name for name, value in first.variables.items() if second.variables[name] == value}
        assert not any(name.endswith("_PORT") or "SOCKET" in name or "FILE" in name for name in shared)
    assert not folder.exists()
    assert not (tmp_path / "1" / "haproxy").is_symlink()


def test_what_a_killed_platform_left_is_removed(tmp_path: Path) -> None:
    killed = ServeProxy(config(tmp_path))
    left = (tmp_path / "haproxy").resolve()
    with closing(killed), closing(ServeProxy(config(tmp_path))):
        assert not left.exists()


def test_connections_are_bounded_by_open_files(tmp_path: Path) -> None:
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    for wanted, given in ((10, 40), (1 << 40, files // 3)):
        joined = config(tmp_path, address="auto", more=f", max_ongoing_requests: {wanted}")
        with closing(ServeProxy(joined)) as environment:
            assert environment.variables["RAY_SERVE_HAPROXY_MAXCONN"] == str(given)


def test_on_a_cluster_serve_keeps_its_files_and_ports(tmp_path: Path) -> None:
    with closing(ServeProxy(config(tmp_path, address="auto"))) as environment:
        assert not any("SOCKET" in name or name.endswith("_PORT") for name in environment.variables)
        assert os.environ["RAY_SERVE_ENABLE_HA_PROXY"] == "1"


def test_python_needs_no_haproxy_and_haproxy_says_that_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy, "haproxy_binary", lambda: None)
    with closing(ServeProxy(config(tmp_path, "python"))):
        assert os.environ["RAY_SERVE_ENABLE_HA_PROXY"] == "0"
    with pytest.raises(BadConfig, match="proxy: python"):
        ServeProxy(config(tmp_path))


def test_one_process_serves_by_one_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Imported:
        RAY_SERVE_ENABLE_HA_PROXY = False

    monkeypatch.setitem(sys.modules, "ray.serve._private.constants", Imported)
    with pytest.raises(Conflict, match=r"serve\.proxy"):
        ServeProxy(config(tmp_path))


def test_the_pages_leave_tcp_and_the_rest_stays(tmp_path: Path) -> None:
    result = adapted(SERVE_CFG, tmp_path / "unavailable.http")
    assert f"bind unix@{tmp_path}/prometheus.sock\n" in result
    assert f"bind unix@{tmp_path}/stats.sock\n" in result
    assert "bind *:8000\n" in result
    assert "splice-request" not in result
    assert "option splice-response\n" in result
    assert f"errorfile 502 {tmp_path}/unavailable.http\n" in result
    assert "http-request deny deny_status 503\n" in result


def test_an_unknown_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="1 of the 2"):
        adapted(SERVE_CFG.replace("bind *:8404", "# none"), tmp_path / "unavailable.http")


def test_haproxy_answers_with_our_error_object_and_dies_with_its_parent(tmp_path: Path) -> None:
    cfg = tmp_path / "haproxy.cfg"
    port = free_port()
    timeouts = "    mode http\n    timeout client 5s\n    timeout server 5s\n    timeout connect 5s\n"
    text = SERVE_CFG.replace("defaults\n", "defaults\n" + timeouts)
    cfg.write_text(text.replace("bind *:8000", f"bind 127.0.0.1:{port}"))
    command = [str(Path(sys.executable).parent / "loraplex-haproxy"), "-db", "-f", str(cfg)]
    parent = subprocess.Popen([sys.executable, "-c", f"import subprocess; subprocess.run({command!r})"])
    try:
        status, headers, body = ask(port)
    finally:
        parent.kill()
        parent.wait()
    assert status == 503
    assert headers["retry-after"] == "1"
    assert json.loads(body)["error"]["code"] == "unavailable"
    deadline_s = time.monotonic() + 5
    while listens(port):
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def serve_variables() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("RAY_SERVE_")}


def ask(port: int) -> tuple[int, dict[str, str], bytes]:
    deadline_s = time.monotonic() + 10
    while not listens(port):
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nhost: here\r\n\r\n")
        response = HTTPResponse(connection)
        response.begin()
        return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
