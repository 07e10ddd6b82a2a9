"""As ``loraplex bench fleet``, for machines without the packages of the command line:

python -m loraplex.bench.fleet prepare EXPERIMENT PREPARED [FIELDS]    JSON files; FIELDS: JSON that replaces fields
python -m loraplex.bench.fleet measure PREPARED RESULTS [OPTIONS]      OPTIONS: the JSON of ``MeasureOptions``
python -m loraplex.bench.fleet show RESULTS [PAGE]                     PAGE: an HTML file to write
"""

import sys
from pathlib import Path

import msgspec

from loraplex.bench.fleet.measure import MeasureOptions, measure, row_lines
from loraplex.bench.fleet.options import read_experiment
from loraplex.bench.fleet.page import fleet_page
from loraplex.bench.fleet.prepared import PreparedFleet
from loraplex.bench.fleet.ranking import ranking_lines
from loraplex.bench.fleet.results import FleetTable
from loraplex.core.errors import BadConfig, LoraplexError


def main(arguments: list[str]) -> None:
    try:
        _run(arguments)
    except LoraplexError as error:
        sys.exit(error.message)


def _run(arguments: list[str]) -> None:
    match arguments:
        case ["prepare", experiment, out, *fields] if len(fields) < 2:
            # Planner and baselines need scipy.
            from loraplex.bench.fleet.prepare import prepare

            prepare(read_experiment(experiment, *fields), say=_say).write(Path(out))
        case ["measure", prepared, out, *options] if len(options) < 2:
            table = measure(PreparedFleet.load(Path(prepared)), Path(out), _options(*options), say=_say)
            if table.left:
                _say(f"left for want of time: {'; '.join(table.left)}")
        case ["show", results, *html] if len(html) < 2:
            table = FleetTable.load(Path(results))
            rows = table.rows
            for path in html:
                Path(path).write_text(fleet_page(table), encoding="utf-8")
            for line in (*(line for row in rows for line in row_lines(row)), *ranking_lines(rows)):
                _say(line)
        case _:
            sys.exit(__doc__)


def _options(text: str = "{}") -> MeasureOptions:
    try:
        return msgspec.json.decode(text, type=MeasureOptions)
    except msgspec.DecodeError as error:
        raise BadConfig(f"options: {error}", param="options") from error


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
