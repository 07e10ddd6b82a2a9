"""One request gives one trace from the gateway to the engine's steps, over the real stream; off, or unsampled, it gives
nothing; and no span tells what was said."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from concurrent import futures
from dataclasses import replace
from typing import Any

import grpc
import msgspec
import pytest
from loraplex.core.wire import GatewayFrame, decode_gateway_frame, encode
from loraplex.gateway.proto import loraplex_v1_pb2 as pb
from loraplex.telemetry.config import TelemetryConfig, TracingConfig
from loraplex.telemetry.recorded_spans import RecordedSpans
from loraplex.telemetry.tracing import ATTRIBUTES, NO_SPAN, Tracing, open_tracing
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_ON

from tests.gateway.conftest import ProxyContext
from tests.router.replicas import make_request
from tests.telemetry.conftest import ACME_KEY, Platform

SECRET_WORDS = "the tulips of Haarlem are for sale"
TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
CALLER = f"00-{TRACE_ID}-00f067aa0ba902b7-00"


class Recorded:
    """A ``Tracing`` whose spans stay here."""

    def __init__(self, config: TracingConfig) -> None:
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider(sampler=ALWAYS_ON)
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracing = Tracing(RecordedSpans(provider.get_tracer("tests"), config))

    @property
    def spans(self) -> tuple[ReadableSpan, ...]:
        return self._exporter.get_finished_spans()

    def named(self, name: str) -> ReadableSpan:
        (found,) = [span for span in self.spans if span.name == name]
        return found

    async def until(self, count: int) -> None:
        """The replica's spans end a little after the answer."""
        async with asyncio.timeout(5):
            while len(self.spans) < count:  # noqa: ASYNC110 (what is waited for has no event)
                await asyncio.sleep(0.01)


def facts(span: ReadableSpan) -> dict[str, Any]:
    return {key.removeprefix("loraplex."): value for key, value in (span.attributes or {}).items()}


def parent(span: ReadableSpan) -> int | None:
    return None if span.parent is None else span.parent.span_id


@pytest.fixture
def recorded(request: pytest.FixtureRequest) -> Recorded:
    return Recorded(getattr(request, "param", TracingConfig(sample_rate=1.0)))


@pytest.fixture
def tracing(recorded: Recorded) -> Tracing:
    return recorded.tracing


async def complete(platform: Platform, model: str, **headers: str) -> None:
    async with platform.client(ACME_KEY) as client:
        body = {"model": model, "prompt": SECRET_WORDS, "max_tokens": 6, "temperature": 0, "ignore_eos": True}
        reply = await client.post("/v1/completions", json=body, headers=headers)
        assert reply.status_code == 200, reply.text


async def test_one_request_is_one_connected_trace(platform: Platform, recorded: Recorded) -> None:
    await complete(platform, "pirate", **{"x-request-id": "my-own-id"})
    await recorded.until(7)
    gateway, router, replica = (recorded.named(name) for name in ("completions", "router", "replica"))
    engine = [recorded.named(f"engine.{part}") for part in ("queue", "first_step", "prefill", "decode")]
    assert len(recorded.spans) == 7
    assert len({span.context.trace_id for span in recorded.spans}) == 1
    assert parent(gateway) is None
    assert parent(router) == gateway.context.span_id
    assert parent(replica) == router.context.span_id
    assert {parent(span) for span in engine} == {replica.context.span_id}
    for span in recorded.spans:
        assert span.start_time <= span.end_time
    for outer, inner in ((gateway, router), (router, replica), *((replica, span) for span in engine)):
        assert outer.start_time <= inner.start_time
    assert engine[0].end_time == engine[1].start_time == engine[2].start_time
    assert engine[2].end_time == engine[3].start_time

    told = facts(gateway)
    assert told["request_id"] == "my-own-id"
    assert (told["tenant"], told["base_model"], told["adapter_name"]) == ("acme", "tiny-base", "pirate")
    assert (told["status"], told["output_tokens"], told["finish_reason"]) == (200, 6, "length")
    assert told["prompt_tokens"] > 6
    assert [event.name for event in gateway.events] == ["first token"]
    assert [event.name for event in router.events] == ["sent"]
    inside = facts(replica)
    assert inside["adapter"] == told["adapter"]
    assert len(inside["adapter"]) == 64
    assert (inside["prompt_tokens"], inside["output_tokens"]) == (told["prompt_tokens"], 6)
    assert inside["replica"] == told["replica"]
    assert facts(engine[3]) == {"num_steps": 5, "output_tokens": 6}
    assert facts(engine[2])["num_steps"] >= 1


async def test_spans_tell_neither_text_nor_keys(platform: Platform, recorded: Recorded) -> None:
    await complete(platform, "tiny-base")
    await recorded.until(7)
    for span in recorded.spans:
        assert facts(span).keys() <= ATTRIBUTES
    everything = "".join(span.to_json() for span in recorded.spans)
    assert "acme" in everything
    for secret in (SECRET_WORDS, *SECRET_WORDS.split()[1:4], ACME_KEY, "lpx_"):
        assert secret not in everything


def test_an_attribute_that_spans_do_not_have_is_a_bug(recorded: Recorded) -> None:
    span = recorded.tracing.begin("x", caller=None, start_s=1.0)
    with pytest.raises(AssertionError):
        span.set(prompt="hello")


async def test_the_trace_of_an_http_caller_goes_on(platform: Platform, recorded: Recorded) -> None:
    await complete(platform, "tiny-base", traceparent=CALLER)
    await recorded.until(7)
    assert {f"{span.context.trace_id:032x}" for span in recorded.spans} == {TRACE_ID}
    assert parent(recorded.named("completions")) == 0x00F067AA0BA902B7


async def test_the_trace_of_a_grpc_caller_goes_on(platform: Platform, recorded: Recorded) -> None:
    context = ProxyContext([("authorization", f"Bearer {ACME_KEY}"), ("traceparent", CALLER)])
    call = pb.GenerateRequest(model="pirate", text=SECRET_WORDS, sampling=pb.SamplingOptions(max_tokens=3))
    responses = [response async for response in platform.gateway.grpc_servicer.Generate(call, context)]
    assert responses[-1].usage.completion_tokens == 3
    await recorded.until(7)
    assert {f"{span.context.trace_id:032x}" for span in recorded.spans} == {TRACE_ID}
    assert facts(recorded.named("grpc.generate"))["output_tokens"] == 3


@pytest.mark.parametrize(
    "wrong", ["", "hello", "00-" + 32 * "0" + "-00f067aa0ba902b7-01", "ff" + CALLER[2:], 999 * "0"]
)
def test_what_is_no_trace_context_begins_a_new_trace(recorded: Recorded, wrong: str) -> None:
    recorded.tracing.begin("x", caller=wrong, start_s=1.0).end()
    assert parent(recorded.named("x")) is None


async def test_refused_requests_end_their_spans(platform: Platform, recorded: Recorded) -> None:
    async with platform.client(ACME_KEY) as client:
        reply = await client.post("/v1/completions", json={"model": "nothing", "prompt": "x"})
    assert reply.status_code == 404
    (span,) = recorded.spans
    assert facts(span)["status"] == 404


async def test_a_client_that_leaves_ends_all_spans(platform: Platform, recorded: Recorded) -> None:
    context = ProxyContext([("authorization", f"Bearer {ACME_KEY}")])
    call = pb.GenerateRequest(model="pirate", text="x", sampling=pb.SamplingOptions(max_tokens=200, ignore_eos=True))
    responses: AsyncIterator[Any] = platform.gateway.grpc_servicer.Generate(call, context)
    await anext(responses)
    await responses.aclose()  # type: ignore[attr-defined]
    await recorded.until(7)
    assert facts(recorded.named("grpc.generate"))["status"] == 499
    assert [event.name for event in recorded.named("router").events][-1] == "aborted"
    assert facts(recorded.named("replica"))["finish_reason"] == "abort"


@pytest.mark.parametrize("recorded", [TracingConfig(sample_rate=0.0)], indirect=True)
async def test_unsampled_requests_leave_nothing(platform: Platform, recorded: Recorded) -> None:
    await complete(platform, "pirate", traceparent=CALLER[:-1] + "1")
    assert recorded.spans == ()


@pytest.mark.parametrize("recorded", [TracingConfig(sample_rate=0.0, follow_callers=True)], indirect=True)
async def test_callers_decide_where_they_may(platform: Platform, recorded: Recorded) -> None:
    await complete(platform, "pirate", traceparent=CALLER)
    await complete(platform, "pirate")
    await complete(platform, "pirate", traceparent=CALLER[:-1] + "1")
    await recorded.until(7)
    assert len(recorded.spans) == 7


@pytest.mark.parametrize("recorded", [TracingConfig(sample_rate=0.25)], indirect=True)
def test_the_rate_is_kept(recorded: Recorded) -> None:
    spans = [recorded.tracing.begin("x", caller=None, start_s=1.0) for _ in range(2000)]
    assert 0.2 < sum(span is not NO_SPAN for span in spans) / 2000 < 0.3


def test_off_is_the_default_and_imports_no_opentelemetry() -> None:
    assert (
        open_tracing(TelemetryConfig().tracing, service="gateway", instance="g").begin("x", caller=CALLER, start_s=1.0)
        is NO_SPAN
    )
    program = (
        "import sys; import loraplex.router.router, loraplex.replica.server; "
        "from loraplex.telemetry.tracing import open_tracing; from loraplex.telemetry.config import TracingConfig; "
        "open_tracing(TracingConfig(), service='s', instance='i'); "
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "[]\n"


class OlderRequest(msgspec.Struct):
    """As a peer of the version before reads it."""

    request_id: str
    tenant: str
    prompt_token_ids: tuple[int, ...]


class OlderFrame(msgspec.Struct):
    submits: tuple[OlderRequest, ...] = ()


def test_a_peer_that_knows_no_traces_ignores_them_and_sends_none() -> None:
    request = make_request()
    frame = encode(GatewayFrame(submits=(replace(request, traceparent=CALLER),)))
    assert decode_gateway_frame(frame).submits[0].traceparent == CALLER
    older = msgspec.msgpack.decode(frame, type=OlderFrame)
    assert older.submits[0].request_id == request.request_id
    fields = msgspec.msgpack.decode(encode(GatewayFrame(submits=(request,))))
    del fields["submits"][0]["traceparent"]
    assert decode_gateway_frame(msgspec.msgpack.encode(fields)).submits == (request,)


class Collector(trace_service_pb2_grpc.TraceServiceServicer):  # type: ignore[misc]
    """An OpenTelemetry collector, as far as spans go."""

    def __init__(self) -> None:
        self.requests: list[Any] = []

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802 (the name of the method on the wire)
        self.requests.append(request)
        return trace_service_pb2.ExportTraceServiceResponse()


@pytest.fixture
def collector() -> Iterator[tuple[Collector, str]]:
    server = grpc.server(futures.ThreadPoolExecutor(2))
    servicer = Collector()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield servicer, f"http://127.0.0.1:{port}"
    server.stop(None)


def test_spans_reach_a_collector(collector: tuple[Collector, str]) -> None:
    servicer, endpoint = collector
    tracing = open_tracing(TracingConfig(endpoint=endpoint, sample_rate=1.0), service="gateway", instance="gw-7")
    span = tracing.begin("completions", caller=None, start_s=1.0)
    tracing.child("router", span.traceparent).end()
    span.set(tenant="acme")
    span.end()
    tracing.close()
    (resource,) = [resource for request in servicer.requests for resource in request.resource_spans]
    about = {entry.key: entry.value.string_value for entry in resource.resource.attributes}
    assert (about["service.name"], about["service.instance.id"]) == ("loraplex-gateway", "gw-7")
    spans = [span for scope in resource.scope_spans for span in scope.spans]
    assert sorted(span.name for span in spans) == ["completions", "router"]
    assert [entry.key for span in spans for entry in span.attributes] == ["loraplex.tenant"]


def test_a_collector_that_is_away_fails_no_request() -> None:
    tracing = open_tracing(
        TracingConfig(endpoint="http://127.0.0.1:1", sample_rate=1.0), service="gateway", instance="gw-7"
    )
    for _ in range(5000):
        tracing.begin("completions", caller=None, start_s=1.0).end()
    tracing.close()
