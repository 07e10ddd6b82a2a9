"""The page: counts add up, markup is whole, names are escaped, nothing is fetched."""

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from loraplex.core.errors import NotFound
from loraplex.traces.arrivals import read_arrivals
from loraplex.traces.plot.collect import HEAT_ROWS, collect
from loraplex.traces.plot.page import render
from loraplex.traces.sink import TraceSink
from loraplex.traces.synth.generate import generate
from loraplex.traces.synth.recipe import Recipe

ARENA = Path(__file__).parent / "data" / "lmsys_arena_200.parquet"
SVG = "{http://www.w3.org/2000/svg}"


def _charts(page: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(text) for text in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


def test_counts(tmp_path: Path) -> None:
    with TraceSink(tmp_path / "x.parquet") as sink:
        for table in generate(Recipe(adapters=60, rate=100, duration_s=900, skew=1.0)):
            sink.write(table)
    pictures, arrivals = collect(tmp_path / "x.parquet"), read_arrivals(tmp_path / "x.parquet")
    assert pictures.requests == pictures.rate.sum() == len(arrivals)
    assert pictures.heat.sum() + pictures.others == len(arrivals)
    assert pictures.others > 0
    assert pictures.heat.shape == (HEAT_ROWS, 120)
    assert pictures.adapters[0] == "tenant-0 / adapter-00"
    assert pictures.heat[0].sum() == np.bincount(arrivals.adapter).max()
    assert pictures.prompt_tokens is not None
    assert pictures.prompt_tokens.counts.sum() == len(arrivals)
    middle = np.sqrt(pictures.prompt_tokens.edges[:-1] * pictures.prompt_tokens.edges[1:])
    mean = float(middle @ pictures.prompt_tokens.counts / len(arrivals))
    assert mean == pytest.approx(arrivals.prompt_tokens.mean(), rel=0.05)


def test_page_is_whole_and_alone() -> None:
    page = render(collect(ARENA), title="Arena")
    charts = _charts(page)
    assert len(charts) == 4
    assert not re.search(r"(src|href)=|url\(|@import|<script", page)
    points = charts[0].find(f"{SVG}polyline")
    assert points is not None
    assert len(points.get("points", "").split()) == 600
    shades = [rect for rect in charts[1].iter(f"{SVG}rect") if rect.get("class") == "heat"]
    assert sum(int("".join(rect.itertext()).rsplit(": ", 1)[1]) for rect in shades) == 200


def test_names_are_escaped_and_gaps_are_said(tmp_path: Path) -> None:
    columns = {"timestamp_s": [0.0, 0.0], "adapter": ["<script>&", None]}
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    page = render(collect(tmp_path / "x.parquet"), title="<b>")
    assert len(_charts(page)) == 2
    assert "<script" not in page
    assert "<b>" not in page
    assert "(base)" in page
    assert page.count("The trace does not say") == 2
    pq.write_table(pa.table({"timestamp_s": pa.array([], pa.float64())}), tmp_path / "y.parquet")
    with pytest.raises(NotFound, match="no rows"):
        collect(tmp_path / "y.parquet")
