"""Tables of several shapes joined into rows."""

from pathlib import Path

import msgspec
import pytest
from loraplex.bench.__main__ import main
from loraplex.bench.options import EngineSetup
from loraplex.bench.shape_rows import ShapeRows
from loraplex.bench.sweep import SweepOptions, run_sweep
from loraplex.core.errors import BadConfig


def sweep(directory: Path, name: str, **setup: int) -> Path:
    options = SweepOptions(
        setup=EngineSetup(
            model="random:tiny-llama", threads=1, num_pages=200, max_running=8, max_step_tokens=64, **setup
        ),
        cases=("base", "lora-32"),
        rounds=2,
        shrink=32,
    )
    run_sweep(options, directory / name, say=lambda _line: None)
    return directory / name


def test_each_case_of_each_shape_is_a_row(tmp_path: Path) -> None:
    files = [sweep(tmp_path, "one.json"), sweep(tmp_path, "two.json", pp=2)]
    main(["shapes", str(tmp_path / "rows.json"), *map(str, files)])
    joined = msgspec.json.decode((tmp_path / "rows.json").read_bytes(), type=ShapeRows)
    assert (joined.model, joined.input_tokens, joined.output_tokens) == ("random:tiny-llama", 8, 4)
    assert [(row.tp, row.pp, row.batch, row.adapters) for row in joined.rows] == [
        (1, 1, 8, 0),
        (1, 1, 8, 1),
        (1, 2, 8, 0),
        (1, 2, 8, 1),
    ]
    for row in joined.rows:
        assert row.step_ms > 0
        assert row.decode_tokens_per_s > 0
        assert row.output_tokens_per_s > 0


def test_what_is_no_table_or_of_another_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "else.json").write_text('{"rows": 3}')
    with pytest.raises(BadConfig, match=r"else\.json: not the table of a sweep"):
        main(["shapes", str(tmp_path / "rows.json"), str(tmp_path / "else.json")])
    assert not (tmp_path / "rows.json").exists()
