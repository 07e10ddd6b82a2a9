"""The report: its figures agree with each other and with a plain count; its page is whole, alone and of a fair size."""

import dataclasses
import json
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from loraplex.cli.output import json_value
from loraplex.core.plan import Shape
from loraplex.cost.profile import CostProfile
from loraplex.engine import EngineConfig
from loraplex.planner.baselines import Baseline
from loraplex.planner.capacity import capacities, demands
from loraplex.planner.packing import Choice, Traffic, to_plan
from loraplex.planner.problem import Kind, Node, Problem, kinds
from loraplex.planner.report import PlanReport, render, reported
from loraplex.planner.report.placement import MAX_ADAPTERS
from loraplex.planner.search import Search
from loraplex.simulator import fast
from loraplex.simulator.scenarios import GPU, LARGE, SMALL, make_arrivals
from loraplex.simulator.types import AdapterSize, CostKey, ReplicaCost, Slo

SVG = "{http://www.w3.org/2000/svg}"
GIVEN = {"trace": "t.parquet", "targets": "ttft=500ms"}


def _problem(nodes: tuple[Node, ...], *, rate: float, num_requests: int, num_adapters: int) -> Problem:
    bases = (SMALL, LARGE)
    arrivals = make_arrivals(rate=rate, num_requests=num_requests, num_adapters=num_adapters, bases=bases, output=40)
    profile, engine = CostProfile.load(GPU), EngineConfig()
    keys = [CostKey(gpu=GPU, base_model_id=b, shape=s) for b in bases for s in profile.shapes(b, GPU)]
    return Problem(
        nodes=nodes,
        arrivals=arrivals,
        adapters=tuple(AdapterSize(lora_rank=16) for _ in arrivals.adapters),
        costs={key: ReplicaCost.of(profile, key, engine) for key in keys},
        slo=Slo(ttft_s=0.3, tpot_s=0.03),
    )


def _spread_plan(problem: Problem, choice: Choice, spread: float) -> Baseline:
    """The same groups, with adapter sets."""
    capacity = capacities(problem, kinds(problem), demands(problem))
    plan = to_plan(problem, Traffic.of(problem), capacity, dataclasses.replace(choice, spread={SMALL: spread}))
    assert plan is not None
    return Baseline(name="<sets>", plan=plan, attainment=0.5, setting="by hand", tried=1, is_alpaserve=False)


@pytest.fixture(scope="module")
def problem() -> Problem:
    nodes = (Node(name="a", gpu=GPU, num_gpus=6), Node(name="b", gpu=GPU, num_gpus=2))
    return _problem(nodes, rate=120.0, num_requests=4000, num_adapters=30)


@pytest.fixture(scope="module")
def report(problem: Problem) -> PlanReport:
    found = Search(problem, evaluations=12).run()
    other = _spread_plan(problem, found.choice, 2.0)
    return reported(problem, found, (other,), parts=20, rate_factors=(0.5, 1.0, 3.0))


def test_figures_agree(problem: Problem, report: PlanReport) -> None:
    for one in report.policies:
        assert one.by_slo == tuple(sorted(one.by_slo))
        assert one.by_slo[report.slo_scales.index(1.0)] == pytest.approx(one.score.attainment)
        assert one.by_rate[1] == pytest.approx(one.score.attainment)
        assert one.by_rate[0] >= one.by_rate[2]
    assert report.policies[0].by_slo[0] < report.policies[0].by_slo[-1]
    own = report.policies[0]
    assert own.score == report.score
    step_s = report.timeline_s[1] - report.timeline_s[0]
    requests = np.array(report.requests_per_s) * step_s
    assert requests.sum() == pytest.approx(4000)
    assert np.nansum(np.array(own.timeline) * requests) == pytest.approx(report.score.num_good)
    for use in report.groups:
        assert sum(adapter.served_by.get(use.name, 0) for adapter in report.adapters) == use.num_requests
    assert sum(adapter.requests for adapter in report.adapters) == 4000
    assert [a.requests for a in report.adapters] == sorted((a.requests for a in report.adapters), reverse=True)


def test_requests_in_flight_as_counted_one_by_one(problem: Problem, report: PlanReport) -> None:
    result = fast.simulate(problem.simulation(report.plan))
    start_s = problem.arrivals.arrival_s
    end_s = start_s + result.ttft_s + result.tpot_s * (problem.arrivals.output_tokens - 1)
    step_s = report.timeline_s[1] - report.timeline_s[0]
    for group in (0, len(report.groups) - 1):
        for part in (0, 7, 19):
            left, right = report.timeline_s[part], report.timeline_s[part] + step_s
            inside = [
                max(0.0, min(right, float(end_s[r])) - max(left, float(start_s[r])))
                for r in np.flatnonzero(result.group == group)
            ]
            assert report.in_flight[group][part] == pytest.approx(sum(inside) / step_s, abs=1e-6)


def _body(page: str) -> ElementTree.Element:
    return ElementTree.fromstring(page[page.index("<body>") : page.index("</html>")])


def test_the_page_shows_all_and_fetches_nothing(report: PlanReport) -> None:
    page = render(report, title="Plan & more", given=GIVEN)
    assert not re.search(r"(src|href)=|url\(|@import|<script", page)
    text = "".join(_body(page).itertext())
    for expected in ("<sets>", "by hand", "fluid bound", "Plan & more", "ttft=500ms", *report.found.reasons):
        assert expected in text
    assert f"--budget {report.found.evaluations} with the same seed repeats it" in text
    for group in report.plan.groups:
        assert f"{group.name}: tp {group.shape.tp}, pp {group.shape.pp}" in text
    assert all(step.what in text for step in report.found.steps)
    charts = list(_body(page).iter(f"{SVG}svg"))
    assert len(charts) == 9
    # Free GPUs show as well.
    planned = sum(group.shape.num_ranks for group in report.plan.groups)
    free = [title.text for title in _body(page).iter(f"{SVG}title") if "without a group" in (title.text or "")]
    assert sum(int((words or "0").split()[0]) for words in free) == 8 - planned


def test_the_move_and_a_plan_without_nodes(problem: Problem, report: PlanReport) -> None:
    anywhere = dataclasses.replace(
        report.plan, groups=tuple(dataclasses.replace(group, nodes=()) for group in report.plan.groups[:-1])
    )
    found = Search(problem, evaluations=4, current=anywhere).run()
    text = "".join(_body(render(reported(problem, found, ()), title="t", given={})).itertext())
    assert "The move from the current plan" in text
    kept = dataclasses.replace(found, plan=anywhere, kept=True)
    text = "".join(_body(render(reported(problem, kept, ()), title="t", given={})).itertext())
    assert "The current plan stays" in text
    assert "on any nodes" in text


def test_the_report_is_json(report: PlanReport) -> None:
    value = json.loads(json.dumps(json_value(report), allow_nan=False))
    assert value["policies"][1]["policy"] == "<sets>"
    assert value["found"]["plan"]["groups"][0]["shape"].keys() == {"tp", "pp"}


def test_64_gpus_and_2000_adapters_make_a_page_of_a_fair_size() -> None:
    nodes = tuple(Node(name=f"h100-{index}", gpu=GPU, num_gpus=8) for index in range(8))
    problem = _problem(nodes, rate=400.0, num_requests=6000, num_adapters=2000)
    found = Search(problem, evaluations=1, max_sample=1000).run()
    groups = (*(Kind(GPU, Shape(), (SMALL,)),) * 48, *(Kind(GPU, Shape(tp=4), (LARGE,)),) * 4)
    sets = _spread_plan(problem, Choice(groups=groups), 4.0)
    made = reported(problem, dataclasses.replace(found, plan=sets.plan), (sets,), rate_factors=(1.0,))
    page = render(made, title="large", given=GIVEN)
    assert len(page.encode()) < 2_000_000
    body = _body(page)
    text = "".join(body.itertext())
    assert f"the {MAX_ADAPTERS} busiest of 2,000" in text
    assert all(f"{group.name}: tp " in text for group in made.plan.groups)
    listed = {share.name for group in made.plan.groups for placed in group.bases for share in placed.adapters}
    histogram = [re.fullmatch(r"([\w -]+): ([\d,]+) adapters", title.text or "") for title in body.iter(f"{SVG}title")]
    counts = {match[1]: int(match[2].replace(",", "")) for match in histogram if match}
    assert sum(counts.values()) == 2000
    assert 2000 - counts["any group"] == len(listed) > 100


def test_the_picture_names_bases_and_nodes(report: PlanReport) -> None:
    picture = next(
        svg
        for svg in _body(render(report, title="t", given={})).iter(f"{SVG}svg")
        if svg.get("aria-label") == "Groups on GPUs"
    )
    words = {text.text for text in picture.iter(f"{SVG}text")}
    assert {"llama3-8b", "llama3-70b", f"a ({GPU})", f"b ({GPU})"} <= words
