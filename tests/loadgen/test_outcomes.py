"""Who met the targets, and prediction beside measurement."""

import math
from html.parser import HTMLParser

import numpy as np
import pytest
from loraplex.core.errors import InvalidInput
from loraplex.core.ids import BaseModelId
from loraplex.core.plan import AdapterShare, BasePlacement, GroupPlan, Plan, Shape
from loraplex.cost.profile import CostProfile
from loraplex.cost.step_cost import StepComposition
from loraplex.engine import EngineConfig
from loraplex.loadgen.charts import scale_chart, sides_table, timeline_chart, ttft_chart
from loraplex.loadgen.comparison import compare, shown_difference
from loraplex.loadgen.completion import Sample
from loraplex.loadgen.outcomes import Outcomes, attainment
from loraplex.loadgen.page import replay_page
from loraplex.loadgen.prediction import predict, replayed_arrivals
from loraplex.loadgen.report import summarize
from loraplex.loadgen.schedule import PlannedRequest
from loraplex.loadgen.targets import Target
from loraplex.simulator.exact import simulate_exact
from loraplex.simulator.types import AdapterSize, CostKey, ReplicaCost, Slo

SLO = Slo(ttft_s=0.5, tpot_s=0.1)
GPU, BASE = "h100-80gb", BaseModelId("llama3-8b")


def sample(
    tenant: str, at_s: float, ttft_s: float, tpot_s: float, *, tokens: int = 11, error: str | None = None
) -> Sample:
    first_s = at_s + ttft_s
    return Sample(
        target=Target(tenant=tenant, model="m", key=None),
        scheduled_s=at_s,
        sent_s=at_s,
        first_token_s=first_s,
        end_s=first_s + tpot_s * (tokens - 1),
        prompt_tokens=5,
        output_tokens=tokens,
        gaps_s=(),
        text="",
        error=error,
        message="",
    )


SAMPLES = [
    sample("acme", 0.0, 0.4, 0.05),
    sample("acme", 1.0, 0.6, 0.05),
    sample("acme", 2.0, 0.4, 0.2),
    sample("acme", 3.0, 0.4, 0.0, tokens=1),
    sample("globex", 4.0, 0.4, 0.05, error="broken"),
]


def test_attainment_counts_all_requests_and_each_tenant_by_itself() -> None:
    report = summarize(SAMPLES, client_cpu_s=0.0, slo=SLO)
    assert report.slo is not None
    assert (report.slo.attainment, report.slo.ttft_attainment, report.slo.tpot_attainment) == (0.4, 0.6, 0.6)
    assert report.slo.goodput_per_s == 0.5
    acme, globex = report.tenants
    assert (acme.tenant, acme.requests, acme.errors) == ("acme", 4, 0)
    assert acme.slo is not None
    assert acme.slo.attainment == 0.5
    assert globex.slo is not None
    assert (globex.errors, globex.slo.attainment, globex.ttft_s) == (1, 0.0, None)
    assert summarize(SAMPLES, client_cpu_s=0.0).slo is None
    assert report.peak_streams == 2, "the third answer takes 2.4 s, into the time of the fourth and the fifth"


def test_looser_targets_are_met_by_more() -> None:
    outcomes = Outcomes.of_samples(SAMPLES)
    shares = [float(np.mean(outcomes.good(SLO, scale))) for scale in (0.5, 1.0, 1.3, 3.0)]
    assert shares == [0.0, 0.4, 0.6, 0.8]
    assert attainment(Outcomes.of_samples([]), SLO).attainment is None


def plan_of(*bases: BasePlacement) -> Plan:
    return Plan(version=1, groups=(GroupPlan(name="g0", shape=Shape(), gpu=GPU, bases=bases),))


def request(at_s: float, model: str, *, tenant: str = "acme", prompt: int = 100, output: int = 20) -> PlannedRequest:
    target = Target(tenant=tenant, model=model, key=None)
    return PlannedRequest(index=0, at_s=at_s, target=target, prompt_tokens=prompt, output_tokens=output)


def test_a_prediction_takes_the_names_of_the_server_and_the_time_of_the_profile() -> None:
    profile, engine = CostProfile.load(GPU), EngineConfig()
    key = CostKey(gpu=GPU, base_model_id=BASE, shape=Shape())
    schedule = [request(0.0, "llama3-8b"), request(10.0, "pirate"), request(20.0, "llama3-8b", tenant="globex")]
    plan = plan_of(BasePlacement(base_model_id=BASE))
    arrivals = replayed_arrivals(schedule, plan)
    assert arrivals.adapter.tolist() == [-1, 0, -1]
    assert arrivals.adapters[0] == ("acme", "llama3-8b", "pirate")
    assert arrivals.tenants == ("acme", "globex")

    predicted = predict(
        schedule,
        plan,
        costs={key: ReplicaCost.of(profile, key, engine)},
        sizes=lambda adapters: tuple(AdapterSize(lora_rank=16) for _ in adapters),
        engine=engine,
        slo=SLO,
        simulator=simulate_exact,
    )
    prefill = StepComposition.of(prefill_rows=1, prefill_tokens=100, prefill_pairs=5050, kv_tokens=100)
    (prefill_s,) = profile.step_cost(BASE, GPU, Shape()).latency_s(prefill)
    assert predicted.ttft_s[[0, 2]] == pytest.approx([prefill_s, prefill_s])
    assert predicted.ttft_s[1] > prefill_s, "its adapter is loaded first"
    assert predicted.tenants[predicted.tenant[2]] == "globex"


def test_an_adapter_of_an_unknown_base_is_named() -> None:
    listed = AdapterShare(tenant="acme", name="pirate")
    other = BaseModelId("other")
    plan = plan_of(BasePlacement(base_model_id=BASE), BasePlacement(base_model_id=other, adapters=(listed,)))
    assert replayed_arrivals([request(0.0, "pirate")], plan).adapters[0].base_model == "other"
    with pytest.raises(InvalidInput, match="acme/lawyer"):
        replayed_arrivals([request(0.0, "lawyer")], plan)


def test_differences_are_points_of_shares_and_percent_of_times() -> None:
    measured = Outcomes.of_samples(SAMPLES)
    faster = [sample("acme", s.scheduled_s, 0.3, 0.05) for s in SAMPLES]
    figures = {figure.name: figure for figure in compare(measured, Outcomes.of_samples(faster), SLO)}
    assert figures["attainment"].difference == pytest.approx(0.6)
    assert shown_difference(figures["attainment"]) == "+60.0 points"
    assert figures["ttft_p50_s"].difference == pytest.approx(-0.25)
    assert shown_difference(figures["ttft_p50_s"]) == "-25.0%"
    none = Outcomes.of_samples([sample("acme", 0.0, 0.1, 0.1, error="429")])
    figure = compare(none, measured, None)[0]
    assert (figure.measured, figure.difference) == (None, None)


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]


def test_the_page_shows_both_sides_and_fetches_nothing() -> None:
    measured = Outcomes.of_samples(SAMPLES)
    report = summarize(SAMPLES, client_cpu_s=0.0, slo=SLO)
    text = replay_page(report, measured, title="A <replay>", slo=SLO, predicted=measured)
    page = Page(text)
    assert page.links == []
    assert "script" not in page.tags
    assert page.tags.count("svg") == 5
    assert text.count("predicted") > text.count("<svg")
    for words in ("A &lt;replay&gt;", "globex", "40.0%", "TTFT 500 ms, TPOT 100 ms", "+0.0 points"):
        assert words in text
    bare = replay_page(summarize(SAMPLES, client_cpu_s=0.0), measured, title="Bare")
    assert Page(bare).tags.count("svg") == 3
    assert "predicted" not in bare


def test_a_page_of_requests_without_answers_and_of_one_moment() -> None:
    failed = [sample("acme", 1.0, 0.1, 0.1, error="429")]
    slo = Slo(ttft_s=0.5)
    assert math.isinf(slo.tpot_s)
    text = replay_page(summarize(failed, client_cpu_s=0.0, slo=slo), Outcomes.of_samples(failed), title="t", slo=slo)
    assert "No request has one." in text
    assert "0.0%" in text


def test_several_runs_stand_side_by_side() -> None:
    runs = [("before", Outcomes.of_samples(SAMPLES)), ("after", Outcomes.of_samples(SAMPLES[:1]))]
    table = sides_table(runs, SLO)
    cells = [row.split("</td>") for row in table.split("<tr>")[2:]]
    shown = [[cell.rpartition(">")[2] for cell in row[:-1]] for row in cells]
    assert shown == [
        ["before", "5", "4", "40.0%", "400", "594", "50", "195.5"],
        ["after", "1", "1", "100.0%", "400", "400", "50", "50"],
    ]
    for picture in (scale_chart(runs, SLO), timeline_chart(runs, SLO), ttft_chart(runs)):
        assert picture is not None
        assert ">before</text>" in picture
        assert ">after</text>" in picture
    unanswered = Outcomes.of_samples(SAMPLES[-1:])
    assert "–</td>" in sides_table([("none", unanswered)], SLO)
    assert ttft_chart([("none", unanswered)]) is None
