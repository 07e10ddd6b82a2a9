"""What the router keeps of a replica's reports."""

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


def test_a_report_names_the_resident_adapters_also_when_the_last_frame_did_not() -> None:
    route = ReplicaRoute(replica_id=ReplicaId("r"), base_model_id=BaseModelId("b"), address="127.0.0.1:1")
    link = Link(route, Owner(), RateBook(RouterConfig()))
    assert link.report.resident_adapters == ()
    link.on_frame(ReplicaFrame(load=LoadReport(steps=1, resident_adapters=(Digest("b"), Digest("a")))))
    link.on_frame(ReplicaFrame(load=LoadReport(steps=2)))
    assert (link.report.steps, link.report.resident_adapters) == (2, ("a", "b"))
    link.on_frame(ReplicaFrame(load=LoadReport(steps=3, resident_adapters=())))
    assert link.report.resident_adapters == ()
