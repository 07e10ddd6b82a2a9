"""A long trace takes no more memory than a short one: peak memory of every command, measured in its own process.

By VmHWM: ``ru_maxrss`` of a child starts at its parent's.
"""

import subprocess
import sys
from pathlib import Path

import pytest

_PROGRAM = """
import sys
sys.argv[0] = "loraplex"
from loraplex.cli.main import main
try:
    main()
except SystemExit as error:
    assert not error.code
with open("/proc/self/status") as file:
    print(next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) // 1024)
"""
SHORT, LONG = 1_000_000, 4_000_000
ROW_BYTES = 28
"""Of a row as arrays alone; the growth that is allowed is a third of what the rows would take."""
MAX_GROWTH_MIB = (LONG - SHORT) * ROW_BYTES // 3 >> 20
MAX_PEAK_MIB = 450


def _peak_mib(*arguments: object) -> int:
    """The lower of two runs: equal ones differ by some 30 MiB, as the allocator keeps what its threads freed."""
    return min(_peak_of_run_mib(*arguments) for _ in range(2))


def _peak_of_run_mib(*arguments: object) -> int:
    result = subprocess.run(
        [sys.executable, "-c", _PROGRAM, "trace", *map(str, arguments)], capture_output=True, text=True, timeout=250
    )
    assert result.returncode == 0, result.stderr
    return int(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, int]]:
    """Rows -> (file, peak MiB of making it)."""
    folder = tmp_path_factory.mktemp("traces")
    made = {}
    for rows in (SHORT, LONG):
        path = folder / f"{rows}.parquet"
        shape = ("--adapters", 200, "--tenants", 10, "--rate", 2000, "--cv", 4, "--lengths", "fixed:100,10")
        made[rows] = (path, _peak_mib("synth", *shape, "--requests", rows, "--out", path))
    return made


def _require_bounded(short_mib: int, long_mib: int) -> None:
    assert long_mib - short_mib < MAX_GROWTH_MIB
    assert long_mib < MAX_PEAK_MIB


def test_synthesis(traces: dict[int, tuple[Path, int]]) -> None:
    _require_bounded(traces[SHORT][1], traces[LONG][1])


@pytest.mark.parametrize(
    "command",
    ["stats {path}", "convert {path} --speed 2 -o {out}/x.parquet", "split {path} --train 0.5 -o {out}"],
)
def test_reading(traces: dict[int, tuple[Path, int]], tmp_path: Path, command: str) -> None:
    peaks = [_peak_mib(*command.format(path=traces[rows][0], out=tmp_path).split()) for rows in (SHORT, LONG)]
    _require_bounded(*peaks)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["split {path} --by-tenant -o {out}", "plot {path} -o {out}/x.html"])
def test_reading_slowly(traces: dict[int, tuple[Path, int]], tmp_path: Path, command: str) -> None:
    peaks = [_peak_mib(*command.format(path=traces[rows][0], out=tmp_path).split()) for rows in (SHORT, LONG)]
    _require_bounded(*peaks)


@pytest.mark.slow
def test_sorting_on_disk(traces: dict[int, tuple[Path, int]], tmp_path: Path) -> None:
    """The two files hold runs of a million rows each and differ in how many there are."""
    out = tmp_path / "sorted.parquet"
    short_mib = _peak_mib("convert", traces[SHORT][0], "--sort", "-o", out)
    long_mib = _peak_mib("convert", traces[LONG][0], "--sort", "-o", out)
    assert out.read_bytes() == traces[LONG][0].read_bytes()
    assert long_mib - short_mib < 200
    assert long_mib < 700
