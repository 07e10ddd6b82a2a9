"""As ``loraplex bench``, options and result as JSON, for machines without the packages of the command line:

python -m loraplex.bench engine OPTIONS        the JSON of ``EngineBenchOptions``
python -m loraplex.bench sweep FILE OPTIONS    the JSON of ``SweepOptions``; the table goes to FILE
python -m loraplex.bench shapes FILE SWEEP...  joins tables of several shapes of a group into FILE
"""

import sys
from pathlib import Path

import msgspec

from loraplex.bench.engine_bench import run_engine_bench
from loraplex.bench.options import EngineBenchOptions
from loraplex.bench.shape_rows import join_sweeps
from loraplex.bench.sweep import SweepOptions, run_sweep


def main(arguments: list[str]) -> None:
    match arguments:
        case ["engine", options]:
            result = run_engine_bench(msgspec.json.decode(options, type=EngineBenchOptions))
            print(msgspec.json.encode(result).decode())
        case ["sweep", file, options]:
            run_sweep(
                msgspec.json.decode(options, type=SweepOptions), Path(file), say=lambda line: print(line, flush=True)
            )
        case ["shapes", file, *sweeps] if sweeps:
            rows = join_sweeps([Path(sweep) for sweep in sweeps])
            Path(file).write_bytes(msgspec.json.format(msgspec.json.encode(rows), indent=1) + b"\n")
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
