"""``loraplex simulate-alpaserve``: recorded AlpaServe placements, scored by our simulator of its contract."""

from pathlib import Path
from typing import Annotated

import typer

from loraplex.cli.connection import JsonOption
from loraplex.cli.output import print_json, print_table
from loraplex.simulator.alpaserve_cases import Case, load_cases

CasesOption = Annotated[Path, typer.Option("--cases", help="cases.json, with profiles and arrivals beside it.")]
ProfilesOption = Annotated[
    Path | None, typer.Option("--profiles", help="Profiling database; by default the one beside the cases.")
]
REPLANNED = "sr-replace-60"
"""Its clocks at a change of the placement are not part of the contract: reported, not compared."""


def simulate_alpaserve_command(
    cases: CasesOption, profiles: ProfilesOption = None, as_json: JsonOption = False
) -> None:
    """Score the recorded placements of AlpaServe cases."""
    found = [(case, _goodputs(case)) for case in load_cases(cases, database=profiles)]
    differences = [
        abs(goodput - recorded)
        for case, goodputs in found
        for policy, goodput in goodputs.items()
        if policy != REPLANNED and (recorded := case.policies[policy].goodput) is not None
    ]
    summary = (
        f"{sum(d == 0.0 for d in differences)} of {len(differences)} recorded goodputs reproduced exactly, "
        f"largest difference {max(differences, default=0.0)}; {REPLANNED} is not compared"
    )
    if as_json:
        print_json(
            {
                "cases": {
                    case.name: {policy: {"goodput": goodput} for policy, goodput in goodputs.items()}
                    for case, goodputs in found
                }
            }
        )
        typer.echo(summary, err=True)
        return
    print_table(
        ["case", "policy", "goodput", "recorded", "difference"],
        [
            [case.name, policy, goodput, recorded, None if recorded is None else goodput - recorded]
            for case, goodputs in found
            for policy, goodput in goodputs.items()
            for recorded in (case.policies[policy].goodput,)
        ],
    )
    typer.echo(summary)


def _goodputs(case: Case) -> dict[str, float]:
    if not case.policies:
        return {}
    work = case.test_work()
    return {policy: recorded.placement.goodput(work, case.profiles) for policy, recorded in case.policies.items()}
