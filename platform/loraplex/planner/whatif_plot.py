"""The curves of ``whatif`` as one picture: attainment of every policy over what was varied. Called by the command."""

from collections.abc import Sequence

from loraplex.core.errors import BadConfig
from loraplex.pages.line_chart import Series, line_chart
from loraplex.planner.whatif import Knob, Point

_AXES = {
    Knob.GPUS: "GPUs",
    Knob.RATE: "rate, times that of the trace",
    Knob.CV: "CV of the gaps between an adapter's requests",
    Knob.SLO: "targets, times those given",
}


def whatif_chart(points: Sequence[Point], *, heading: str = "") -> str:
    """SVG. Points in any order, all of one knob; BadConfig for none."""
    if not points:
        raise BadConfig("there are no points to draw")
    ordered = sorted(points, key=_x)
    x = [_x(point) for point in ordered]
    lines = [
        Series(name=policy, x=x, y=[point.attainment.get(policy, float("nan")) for point in ordered])
        for policy in dict.fromkeys(name for point in ordered for name in point.attainment)
    ]
    return line_chart(
        lines,
        x_label=_AXES[ordered[0].knob],
        y_label="attainment",
        y_high=1.0,
        x_log=x[-1] >= 4 * x[0],
        height=320,
        heading=heading,
    )


def _x(point: Point) -> float:
    return float(point.num_gpus) if point.knob is Knob.GPUS else point.value
