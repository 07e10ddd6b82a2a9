"""The default path of a request, HAProxy: what passes through it, when, and what it answers by itself."""

import json
import socket
import time
from collections.abc import Callable

import grpc
import httpx
import pytest
from loraplex.demo import JSON
from loraplex.gateway.proto import loraplex_v1_pb2 as pb
from loraplex.gateway.proto import loraplex_v1_pb2_grpc as rpc

from tests.deployments import test_grpc, test_http
from tests.deployments.conftest import Demo
from tests.deployments.served import Served

pytestmark = pytest.mark.ray

_LONG = {"model": "pirate", "prompt": "Tell me a story about whales.", "max_tokens": 300, "ignore_eos": True}
_ABORTED_WITHIN_S = 1.0
"""A step takes about 30 ms, the 300 tokens of a request ten seconds."""


@pytest.mark.parametrize(
    "check",
    [
        test_grpc.test_generate_streams_text_and_ends_with_usage,
        test_grpc.test_errors_have_canonical_codes,
        test_grpc.test_an_adapter_is_registered_used_and_deleted,
        test_grpc.test_health_and_reflection,
        test_http.test_a_stream_carries_the_same_text_and_usage_as_the_plain_call,
        test_http.test_another_tenants_adapter_is_told_apart_from_nothing,
        test_http.test_every_response_has_one_request_id_and_errors_have_all_four_keys,
        test_http.test_a_configured_tenant_gets_a_key_and_meets_its_limit,
    ],
)
def test_it_behaves_as_the_python_proxies_do(behind_haproxy: Served, check: Callable[[Demo], None]) -> None:
    check(Demo(content=behind_haproxy.demo))


def test_only_the_configured_ports_are_open_and_on_the_configured_host(behind_haproxy: Served) -> None:
    (haproxy,) = behind_haproxy.processes("haproxy -db")
    listening = {connection.laddr for connection in haproxy.net_connections("tcp") if connection.status == "LISTEN"}
    listen = behind_haproxy.config["listen"]
    assert listening == {("127.0.0.1", port) for port in listen.values()}  # type: ignore[attr-defined]


def test_each_token_passes_as_it_comes(behind_haproxy: Served) -> None:
    arrivals_s = []
    body = _LONG | {"max_tokens": 40, "stream": True}
    with httpx.stream("POST", f"{behind_haproxy.http}/v1/completions", json=body, headers=bearer(behind_haproxy)) as r:
        for _ in r.iter_raw():
            arrivals_s.append(time.monotonic())
    assert len(arrivals_s) > 30
    first_half_s, whole_s = arrivals_s[len(arrivals_s) // 2] - arrivals_s[0], arrivals_s[-1] - arrivals_s[0]
    assert 0.25 < first_half_s / whole_s < 0.75


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_aborts_its_request(behind_haproxy: Served, stream: bool) -> None:
    """Before a plain answer begins, or within a stream. The body comes apart from the head, as clients send it."""
    body = json.dumps(_LONG | {"stream": stream}).encode()
    connection = connect(behind_haproxy, "/v1/completions", f"content-type: application/json\r\n{length(body)}")
    time.sleep(0.05)
    connection.sendall(body)
    wait_until(lambda: num_running(behind_haproxy) == 1, within_s=10)
    if stream:
        assert b"200 OK" in connection.recv(4096)
    connection.close()
    wait_until(lambda: num_running(behind_haproxy) == 0, within_s=_ABORTED_WITHIN_S)


def test_a_cancelled_call_aborts_its_request(behind_haproxy: Served) -> None:
    request = pb.GenerateRequest(
        model="pirate", text="Whales", sampling=pb.SamplingOptions(max_tokens=300, ignore_eos=True)
    )
    with grpc.insecure_channel(str(behind_haproxy.demo["grpc"])) as channel:
        call = rpc.LoraplexStub(channel).Generate(request, metadata=list(bearer(behind_haproxy).items()))
        next(call)
        assert num_running(behind_haproxy) == 1
        call.cancel()
        wait_until(lambda: num_running(behind_haproxy) == 0, within_s=_ABORTED_WITHIN_S)


def test_one_connection_serves_many_requests(behind_haproxy: Served) -> None:
    with httpx.Client(base_url=behind_haproxy.http, headers=bearer(behind_haproxy)) as client:
        ports = {
            client.get(path).extensions["network_stream"].get_extra_info("client_addr")[1]
            for path in ("/v1/models", "/v1/no-such", "/v1/models")
        }
    assert len(ports) == 1


def test_an_upload_waits_for_100_continue_and_is_refused_before_its_body(behind_haproxy: Served) -> None:
    fields = {"name": "expected"}
    files = {
        name: (JSON.directory / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")
    }
    form = httpx.Request("POST", behind_haproxy.http, data=fields, files=files)
    body = form.read()
    head = f"expect: 100-continue\r\ncontent-type: {form.headers['content-type']}\r\n"
    upload = connect(behind_haproxy, "/v1/adapters", head + length(body))
    assert upload.recv(4096).startswith(b"HTTP/1.1 100 Continue")
    upload.sendall(body)
    assert upload.recv(4096).startswith(b"HTTP/1.1 201")
    too_large = connect(behind_haproxy, "/v1/adapters", f"{head}content-length: {1 << 40}\r\n")
    # Serve asks for the body at once, and so promises that it will be read; the refusal follows all the same.
    answer = b""
    while b'"payload_too_large"' not in answer:
        answer += too_large.recv(4096)
    assert b"HTTP/1.1 413" in answer


def test_a_large_upload_passes_whole(behind_haproxy: Served) -> None:
    """64 MiB of zeros: read to the end, then refused for what they are."""
    files = {
        "adapter_config.json": (JSON.directory / "adapter_config.json").read_bytes(),
        "adapter_model.safetensors": bytes(64 << 20),
    }
    answer = httpx.post(
        f"{behind_haproxy.http}/v1/adapters",
        data={"name": "zeros"},
        files=files,
        headers=bearer(behind_haproxy),
        timeout=60,
    )
    assert answer.status_code == 400
    assert "safetensors" in answer.json()["error"]["message"]


def test_a_request_of_a_lost_gateway_fails_and_runs_nowhere_else_and_the_next_waits_or_comes_again(
    behind_haproxy: Served,
) -> None:
    body = json.dumps(_LONG).encode()
    connection = connect(behind_haproxy, "/v1/completions", f"content-type: application/json\r\n{length(body)}")
    connection.sendall(body)
    wait_until(lambda: num_running(behind_haproxy) == 1, within_s=10)
    (gateway,) = behind_haproxy.processes("ServeReplica:loraplex:gateway")
    gateway.kill()
    answer = connection.recv(4096)  # HAProxy closes a used connection without a word, else it answers 503
    assert answer == b"" or answer.startswith(b"HTTP/1.1 503")

    def ask() -> httpx.Response:
        return httpx.get(f"{behind_haproxy.http}/v1/models", headers=bearer(behind_haproxy), timeout=60)

    models = ask()
    if models.status_code == 503:
        # It came between the loss and its being noticed.
        assert models.headers["retry-after"], models.text
        wait_until(lambda: ask().status_code == 200, within_s=30)
    else:
        assert models.status_code == 200, models.text
    assert num_running(behind_haproxy) == 0


def bearer(served: Served) -> dict[str, str]:
    return {"authorization": f"Bearer {served.key('acme')}"}


def length(body: bytes) -> str:
    return f"content-length: {len(body)}\r\n"


def connect(served: Served, path: str, headers: str) -> socket.socket:
    """A connection on which the head of a POST is sent, the body not."""
    url = httpx.URL(served.http)
    connection = socket.create_connection((url.host, url.port), timeout=30)
    key = f"authorization: {bearer(served)['authorization']}\r\n"
    connection.sendall(f"POST {path} HTTP/1.1\r\nhost: here\r\n{key}{headers}\r\n".encode())
    return connection


def num_running(served: Served) -> int:
    admin = {"authorization": f"Bearer {served.demo['admin_key']}"}
    status = httpx.get(f"{served.http}/v1/status", headers=admin, timeout=10).json()
    return int(status["replicas"][0]["load"]["num_running"])


def wait_until(condition: Callable[[], bool], *, within_s: float) -> None:
    deadline_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
