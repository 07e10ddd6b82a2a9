"""What a plan comes to, beside what others would have done: ``collect`` scores, ``values`` says what is known then,
``page`` and ``placement`` draw it on one HTML page that needs nothing else.

Called by the command ``plan``.
"""

from loraplex.planner.report.collect import RATE_FACTORS, SLO_SCALES, reported
from loraplex.planner.report.page import render
from loraplex.planner.report.values import AdapterUse, PlanReport, PolicyScore

__all__ = ["RATE_FACTORS", "SLO_SCALES", "AdapterUse", "PlanReport", "PolicyScore", "render", "reported"]
