"""Both runners and the client against a server of known delays and faults."""

import asyncio
import time

import pytest
from loraplex.core.errors import BadConfig
from loraplex.loadgen.client_processes import ClientLoad, run_clients
from loraplex.loadgen.closed_loop import run_closed_loop
from loraplex.loadgen.completion import CompletionClient, Sample
from loraplex.loadgen.config import Endpoint, RequestConfig
from loraplex.loadgen.file_limit import allow_streams
from loraplex.loadgen.http_client import HttpClient
from loraplex.loadgen.open_loop import run_open_loop
from loraplex.loadgen.prompts import RandomTokens, WordPrompts
from loraplex.loadgen.report import summarize
from loraplex.loadgen.schedule import PlannedRequest
from loraplex.loadgen.targets import Target

_PROMPTS = WordPrompts(seed=0)


def _target(model: str) -> Target:
    return Target(tenant="acme", model=model, key="secret")


def _schedule(times_s: list[float], model: str = "ok", output_tokens: int = 4) -> list[PlannedRequest]:
    return [
        PlannedRequest(index=i, at_s=at_s, target=_target(model), prompt_tokens=5, output_tokens=output_tokens)
        for i, at_s in enumerate(times_s)
    ]


async def _one(url: str, model: str, **config: object) -> Sample:
    http = HttpClient(url, connect_timeout_s=2.0)
    client = CompletionClient(http, RequestConfig(**config))  # type: ignore[arg-type]
    data = client.encode(_target(model), "hello", 5)
    sample = await client.run(
        data, target=_target(model), origin_s=time.perf_counter(), scheduled_s=0.0, prompt_tokens=1
    )
    http.close()
    return sample


async def test_an_answer_is_timed(server) -> None:  # type: ignore[no-untyped-def]
    sample = await _one(server.url, "slow")
    assert sample.error is None
    assert (sample.prompt_tokens, sample.output_tokens, len(sample.gaps_s)) == (7, 5, 4)
    assert sample.first_token_s == pytest.approx(0.05, abs=0.04)
    assert sample.end_s == pytest.approx(0.25, abs=0.1)
    assert all(gap_s == pytest.approx(0.05, abs=0.04) for gap_s in sample.gaps_s)
    assert server.keys == ["Bearer secret"]
    body = server.bodies[0]
    assert (body["prompt"], body["stream"], body["ignore_eos"], body["max_tokens"]) == ("hello", True, True, 5)


async def test_chat_body(server) -> None:  # type: ignore[no-untyped-def]
    await _one(server.url, "ok", endpoint=Endpoint.CHAT, ignore_eos=False)
    assert server.bodies[0]["messages"] == [{"role": "user", "content": "hello"}]
    assert "ignore_eos" not in server.bodies[0]


@pytest.mark.parametrize(
    ("model", "error", "word"),
    [
        ("busy", "429", "too many"),
        ("length", "500", "too many"),
        ("cut", "broken", "middle"),
        ("nodone", "broken", "DONE"),
        ("inband", "stream", "replica lost"),
        ("silent", "timeout", "0.2 s"),
    ],
)
async def test_faults_are_told_apart(server, model: str, error: str, word: str) -> None:  # type: ignore[no-untyped-def]
    sample = await _one(server.url, model, timeout_s=0.2)
    assert sample.error == error
    assert word in sample.message


async def test_nobody_listens() -> None:
    sample = await _one("http://127.0.0.1:9", "ok")
    assert sample.error == "connect"
    for url in ("ftp://x", "localhost:8000", "http://", "http://x:port"):
        with pytest.raises(BadConfig):
            HttpClient(url, connect_timeout_s=1.0)


async def test_connections_are_used_again_and_replaced_when_closed(server) -> None:  # type: ignore[no-untyped-def]
    http = HttpClient(server.url, connect_timeout_s=2.0)
    client = CompletionClient(http, RequestConfig())
    for model in ("ok", "ok", "busy", "ok", "cut", "ok"):
        data = client.encode(_target(model), "hello", 4)
        await client.run(data, target=_target(model), origin_s=0.0, scheduled_s=0.0, prompt_tokens=1)
    assert server.num_connections == 2
    http.close()


@pytest.mark.parametrize(("model", "num_sent"), [("die", 1), ("stale", 2)])
async def test_a_request_is_sent_again_only_if_its_connection_breaks_at_once(server, model: str, num_sent: int) -> None:  # type: ignore[no-untyped-def]
    """Later the server may have begun it: twice the load, and both times in one sample."""
    http = HttpClient(server.url, connect_timeout_s=2.0)
    client = CompletionClient(http, RequestConfig())
    samples = []
    for name in ("ok", model):
        data = client.encode(_target(name), "hello", 4)
        samples.append(await client.run(data, target=_target(name), origin_s=0.0, scheduled_s=0.0, prompt_tokens=1))
    assert [sample.error for sample in samples] == [None, "broken"]
    assert [body["model"] for body in server.bodies] == ["ok"] + [model] * num_sent
    http.close()


async def test_open_loop_keeps_its_times(server) -> None:  # type: ignore[no-untyped-def]
    times_s = [i * 0.02 for i in range(40)]
    http = HttpClient(server.url, connect_timeout_s=2.0)
    samples = await run_open_loop(_schedule(times_s), CompletionClient(http, RequestConfig()), _PROMPTS)
    http.close()
    assert sorted(sample.scheduled_s for sample in samples) == times_s
    lag_s = sorted(sample.sent_s - sample.scheduled_s for sample in samples)
    assert lag_s[0] >= 0
    assert lag_s[len(lag_s) // 2] < 0.02
    gaps_s = [after - before for before, after in zip(server.arrivals_s, server.arrivals_s[1:], strict=False)]
    assert sum(gaps_s) == pytest.approx(0.78, abs=0.1)


async def test_no_coordinated_omission(server) -> None:  # type: ignore[no-untyped-def]
    """The server stops for half a second; every request scheduled meanwhile must show the wait it suffered."""
    schedule = _schedule([i * 0.01 for i in range(60)])
    stalling = _schedule([0.1], "stall")[0]
    schedule[10] = PlannedRequest(index=10, at_s=0.1, target=stalling.target, prompt_tokens=5, output_tokens=4)
    http = HttpClient(server.url, connect_timeout_s=2.0)
    samples = await run_open_loop(schedule, CompletionClient(http, RequestConfig()), _PROMPTS)
    http.close()
    assert all(sample.error is None for sample in samples)
    hit = [sample for sample in samples if 0.1 < sample.scheduled_s < 0.5]
    for sample in hit:
        assert sample.first_token_s is not None
        assert sample.first_token_s - sample.scheduled_s >= 0.6 - sample.scheduled_s - 0.02
        assert sample.sent_s - sample.scheduled_s < 0.1, "sent on time although nothing came back"


async def test_open_loop_sends_more_than_it_prepares_ahead(server, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("loraplex.loadgen.open_loop._MAX_PREPARED", 3)
    http = HttpClient(server.url, connect_timeout_s=2.0)
    seen: list[Sample] = []
    schedule = _schedule([0.0] * 10 + [0.05 + 0.001 * i for i in range(10)])
    samples = await run_open_loop(schedule, CompletionClient(http, RequestConfig()), _PROMPTS, on_sample=seen.append)
    http.close()
    assert len(samples) == 20
    assert seen == samples
    assert len({body["prompt"] for body in server.bodies}) == 20


async def test_thousands_of_streams_from_one_process(server) -> None:  # type: ignore[no-untyped-def]
    count = 2000
    assert allow_streams(2 * count) == 2 * count, "both ends of each stream are in this process"
    server.token_s = 1.5
    http = HttpClient(server.url, connect_timeout_s=30.0)
    schedule = _schedule([i * 0.001 for i in range(count)], output_tokens=4)
    samples = await run_open_loop(schedule, CompletionClient(http, RequestConfig()), _PROMPTS)
    http.close()
    assert {sample.error for sample in samples} == {None}
    report = summarize(samples, client_cpu_s=0.0)
    assert report.peak_streams == count
    assert report.output_tokens == 4 * count


async def test_closed_loop_keeps_its_concurrency(server) -> None:  # type: ignore[no-untyped-def]
    http = HttpClient(server.url, connect_timeout_s=2.0)
    samples = await run_closed_loop(
        [_target("ok"), _target("slow")],
        CompletionClient(http, RequestConfig()),
        _PROMPTS,
        indices=range(10),
        concurrency=3,
        prompt_tokens=5,
        output_tokens=2,
    )
    http.close()
    assert [sample.target.model for sample in samples].count("slow") == 5
    assert server.num_connections == 3
    events = sorted([(s.sent_s, 1) for s in samples] + [(s.end_s, -1) for s in samples])
    running = peak = 0
    for _, change in events:
        running += change
        peak = max(peak, running)
    assert peak == 3


async def test_client_processes_share_a_load_and_begin_together(server) -> None:  # type: ignore[no-untyped-def]
    load = ClientLoad(
        url=server.url,
        config=RequestConfig(),
        targets=(_target("ok"), _target("slow")),
        prompts=RandomTokens(50, seed=1),
        num_requests=9,
        streams=4,
        prompt_tokens=6,
        output_tokens=3,
    )
    sent_before_start: list[int] = []
    run = await asyncio.to_thread(
        run_clients, load, num_processes=2, on_start=lambda: sent_before_start.append(len(server.bodies))
    )
    assert sent_before_start == [0]
    assert len(run.cpu_s) == 2
    assert all(sample.error is None for sample in run.samples)
    assert all(sample.sent_s >= 0 for sample in run.samples)
    assert [body["model"] for body in server.bodies].count("slow") == 4
    prompts = [tuple(body["prompt"]) for body in server.bodies]
    assert len(set(prompts)) == 9
    assert all(len(prompt) == 6 and max(prompt) < 50 for prompt in prompts)
    assert server.num_connections == 4


async def test_a_client_process_that_cannot_make_its_requests_ends_the_run(server) -> None:  # type: ignore[no-untyped-def]
    load = ClientLoad(
        url=server.url,
        config=RequestConfig(endpoint=Endpoint.CHAT),
        targets=(_target("ok"),),
        prompts=RandomTokens(50, seed=1),
        num_requests=2,
        streams=2,
        prompt_tokens=6,
        output_tokens=3,
    )
    with pytest.raises(BadConfig, match="chat messages are text"):
        await asyncio.to_thread(run_clients, load, num_processes=2)
    assert server.bodies == []


async def test_cancelling_leaves_nothing_running(server) -> None:  # type: ignore[no-untyped-def]
    http = HttpClient(server.url, connect_timeout_s=2.0)
    run = asyncio.create_task(
        run_open_loop(_schedule([0.0, 0.0], "silent"), CompletionClient(http, RequestConfig()), _PROMPTS)
    )
    await asyncio.sleep(0.1)
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    await asyncio.sleep(0.01)
    assert len(asyncio.all_tasks()) - server.num_connections <= 1
    http.close()


def _sample(**changes: object) -> Sample:
    values: dict[str, object] = {
        "target": _target("m"),
        "scheduled_s": 1.0,
        "sent_s": 1.1,
        "first_token_s": 1.5,
        "end_s": 2.5,
        "prompt_tokens": 10,
        "output_tokens": 5,
        "gaps_s": (0.25, 0.25, 0.25, 0.25),
        "text": "",
        "error": None,
        "message": "",
    }
    return Sample(**{**values, **changes})  # type: ignore[arg-type]


def test_report_by_hand() -> None:
    samples = [
        _sample(),
        _sample(scheduled_s=2.0, sent_s=2.0, first_token_s=2.5, end_s=3.0, output_tokens=1, gaps_s=()),
        _sample(
            scheduled_s=3.0, sent_s=3.0, first_token_s=None, end_s=5.0, output_tokens=0, error="429", message="later"
        ),
        _sample(
            scheduled_s=3.0, sent_s=3.0, first_token_s=None, end_s=4.0, output_tokens=0, error="429", message="first"
        ),
    ]
    report = summarize(samples, client_cpu_s=0.6)
    assert (report.requests, report.completed, report.errors) == (4, 2, {"429": 2})
    assert report.error_examples == {"429": "first"}
    assert (report.duration_s, report.offered_rate_per_s, report.completed_rate_per_s) == (4.0, 1.5, 0.5)
    assert (report.output_tokens, report.output_tokens_per_s) == (6, 1.5)
    assert report.client_cpu_ms_per_token == pytest.approx(100.0)
    assert report.ttft_s is not None
    assert (report.ttft_s.count, report.ttft_s.mean) == (2, 0.5)
    assert report.tpot_s is not None
    assert (report.tpot_s.count, report.tpot_s.mean) == (1, 0.25)
    assert report.e2e_s is not None
    assert report.e2e_s.max == 1.5
    assert report.send_lag_s is not None
    assert report.send_lag_s.max == pytest.approx(0.1)
    assert (report.targets[0].requests, report.targets[0].errors) == (4, 2)


def test_empty_report() -> None:
    report = summarize([], client_cpu_s=0.0)
    assert (report.requests, report.ttft_s, report.output_tokens_per_s) == (0, None, 0.0)
