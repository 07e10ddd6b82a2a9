"""What a benchmark leaves behind: figures in a file, lines on stdout, a warning that they are of no use."""

import json
from pathlib import Path

import pytest
from loraplex_deployments.bench_report import report


@pytest.mark.parametrize(("cpu", "busy"), [(0.5, False), (0.95, True)])
def test_figures_lines_and_a_warning(
    cpu: float, busy: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "figures.json"
    report({"rate": 1.5, "errors": {"503": 2}}, ["first", "second"], cpu=cpu, out=out)
    assert json.loads(out.read_text()) == {"rate": 1.5, "errors": {"503": 2}}
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == ["first", "second"]
    assert ("95% of its CPU" in "".join(printed[2:])) is busy
