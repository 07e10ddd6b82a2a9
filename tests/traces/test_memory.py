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
    result = subprocess.run(
        [sys.executable, "-c", _PROGRAM, "trace", *map(str, arguments)], capture_output=True, text=True, timeout=250
    )
    assert result.returncode == 0, result.stderr
    return int(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, int]]:
    """Rows -> (file, peak MiB of making it)."""
    folder = tmp_path_factory.mktemp("traces")
    files = {rows: folder / f"{rows}.parquet" for rows in (SHORT, LONG)}
    shape = ("--adapters", 200, "--tenants", 10, "--rate", 2000, "--cv", 4, "--lengths", "fixed:100,10")
    peaks = _peaks(*(("synth", *shape, "--requests", rows, "--out", path) for rows, path in files.items()))
    return {rows: (path, peak) for (rows, path), peak in zip(files.items(), peaks, strict=True)}


def _peaks(*commands: tuple[object, ...], growth_mib: int = MAX_GROWTH_MIB, peak_mib: int = MAX_PEAK_MIB) -> list[int]:
    """Of the same command over the short and the long trace. Equal runs differ by some 30 MiB, as the allocator keeps
    what its threads freed: each is run again where that may be what is seen, and the lower peak counts."""
    peaks = [_peak_mib(*command) for command in commands]
    if not _is_bounded(*peaks, growth_mib=growth_mib, peak_mib=peak_mib):
        peaks = [min(peak, _peak_mib(*command)) for peak, command in zip(peaks, commands, strict=True)]
    return peaks


def _is_bounded(
    short_mib: int, long_mib: int, *, growth_mib: int = MAX_GROWTH_MIB, peak_mib: int = MAX_PEAK_MIB
) -> bool:
    return long_mib - short_mib < growth_mib and long_mib < peak_mib


def test_synthesis(traces: dict[int, tuple[Path, int]]) -> None:
    assert _is_bounded(traces[SHORT][1], traces[LONG][1])


@pytest.mark.parametrize(
    "command",
    ["stats {path}", "convert {path} --speed 2 -o {out}/x.parquet", "split {path} --train 0.5 -o {out}"],
)
def test_reading(traces: dict[int, tuple[Path, int]], tmp_path: Path, command: str) -> None:
    peaks = _peaks(*(tuple(command.format(path=traces[rows][0], out=tmp_path).split()) for rows in (SHORT, LONG)))
    assert _is_bounded(*peaks), peaks


@pytest.mark.slow
@pytest.mark.parametrize("command", ["split {path} --by-tenant -o {out}", "plot {path} -o {out}/x.html"])
def test_reading_slowly(traces: dict[int, tuple[Path, int]], tmp_path: Path, command: str) -> None:
    peaks = _peaks(*(tuple(command.format(path=traces[rows][0], out=tmp_path).split()) for rows in (SHORT, LONG)))
    assert _is_bounded(*peaks), peaks


@pytest.mark.slow
def test_sorting_on_disk(traces: dict[int, tuple[Path, int]], tmp_path: Path) -> None:
    """The two files hold runs of a million rows each and differ in how many there are."""
    out = tmp_path / "sorted.parquet"
    commands = [("convert", traces[rows][0], "--sort", "-o", out) for rows in (SHORT, LONG)]
    peaks = _peaks(*commands, growth_mib=200, peak_mib=700)
    assert out.read_bytes() == traces[LONG][0].read_bytes()
    assert _is_bounded(*peaks, growth_mib=200, peak_mib=700), peaks
