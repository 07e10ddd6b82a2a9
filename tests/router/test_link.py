"""What the router keeps of a replica's reports."""

import pytest
from loraplex.core.control import ReplicaRoute
from loraplex.core.ids import BaseModelId, Digest, ReplicaId
from loraplex.core.wire import LoadReport, ReplicaFrame
from loraplex.router.config import RouterConfig
from loraplex.router.link import Link
from loraplex.router.rates import RateBook
from loraplex.router.stream import Generation


class Owner:
    def link_changed(self, link: Link) -> None:
        pass

    def generation_ended(self, generation: Generation) -> None:
        raise AssertionError("nothing runs here")

    def generation_refused(self, link: Link, generation: Generation) -> bool:
        raise AssertionError("nothing runs here")

    def link_lost(self, link: Link, generations: list[Generation]) -> None:
        pass


def link() -> Link:
    route = ReplicaRoute(replica_id=ReplicaId("r"), base_model_id=BaseModelId("b"), address="127.0.0.1:1")
    return Link(route, Owner(), RateBook(RouterConfig()))


def test_a_report_names_the_resident_adapters_also_when_the_last_frame_did_not() -> None:
    replica = link()
    assert replica.report.resident_adapters == ()
    replica.on_frame(ReplicaFrame(load=LoadReport(steps=1, resident_adapters=(Digest("b"), Digest("a")))))
    replica.on_frame(ReplicaFrame(load=LoadReport(steps=2)))
    assert (replica.report.steps, replica.report.resident_adapters) == (2, ("a", "b"))
    replica.on_frame(ReplicaFrame(load=LoadReport(steps=3, resident_adapters=())))
    assert replica.report.resident_adapters == ()


def test_the_first_report_of_a_stream_is_no_measurement() -> None:
    """It counts since the replica's start, also what was idle or served before the stream was up."""
    replica = link()
    step = LoadReport(steps=1, generated_tokens=8, busy_s=0.02)
    life = LoadReport(steps=100_000, generated_tokens=100_000, prefilled_tokens=10, busy_s=2e4)
    unknown = replica.view.rates
    replica.on_frame(ReplicaFrame(load=life))
    assert replica.view.rates == unknown
    for count in range(1, 65):
        replica.on_frame(ReplicaFrame(load=after(life, step, count)))
    measured = replica.view.rates
    assert measured.step_s + 8 * measured.row_s == pytest.approx(0.02, rel=1e-3)
    replica.on_down("test")
    for count in range(65, 129):
        replica.on_frame(ReplicaFrame(load=after(life, step, count)))
    assert replica.view.rates.step_s + 8 * replica.view.rates.row_s == pytest.approx(0.02, rel=1e-3)


def after(life: LoadReport, step: LoadReport, count: int) -> LoadReport:
    """``life`` and as many of ``step``."""
    return LoadReport(
        steps=life.steps + count * step.steps,
        generated_tokens=life.generated_tokens + count * step.generated_tokens,
        prefilled_tokens=life.prefilled_tokens,
        busy_s=life.busy_s + count * step.busy_s,
    )
