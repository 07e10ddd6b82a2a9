"""Pictures are whole, say what they were given, escape it, and stand alone; pages fetch nothing."""

import math
import re
import struct
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import resvg_py
from hypothesis import given
from hypothesis import strategies as st
from loraplex.core.errors import Unavailable
from loraplex.pages.bar_chart import bar_chart
from loraplex.pages.grouped_bars import Bars, grouped_bars
from loraplex.pages.heat_map import heat_map
from loraplex.pages.line_chart import Series, line_chart
from loraplex.pages.page import bullets, figures, folded, page, paragraph, section, table
from loraplex.pages.png import _font, png, standalone
from loraplex.pages.scale import Scale, round_top, round_up

SVG = "{http://www.w3.org/2000/svg}"
LINES = [
    Series(name="<ours>", x=[1, 2, 4], y=[0.5, math.nan, 1.0]),
    Series(name="other & more", x=[1, 2, 4], y=[0.2, 0.3, 0.4]),
]


def _tips(picture: str) -> list[str]:
    return [title.text or "" for title in ElementTree.fromstring(picture).iter(f"{SVG}title")]


@given(low=st.floats(1e-6, 1e6), span=st.floats(1e-3, 1e6), count=st.integers(2, 10), is_log=st.booleans())
def test_ticks_lie_within_and_are_about_as_many(low: float, span: float, count: int, is_log: bool) -> None:
    scale = Scale(low=low, high=low + span, start=0, end=100, is_log=is_log)
    ticks = scale.ticks(count)
    assert ticks == sorted(set(ticks))
    assert 1 <= len(ticks) <= 2 * count + 1
    # Labels have room: no tick lies off the axis.
    assert all(-0.5 <= scale(tick) <= 100.5 for tick in ticks)


def test_scales_and_round_numbers() -> None:
    scale = Scale(low=0.25, high=4, start=10, end=50, is_log=True)
    assert (scale(0.25), scale(1), scale(4)) == (10, 30, 50)
    assert Scale(low=3, high=3, start=0, end=10)(3) == 5
    assert (round_top(0, 102), round_top(0.5, 1), round_top(0, 0)) == (150, 1, 1)
    assert [round_up(value) for value in (0, 0.3, 1, 1.1, 37, 500.0)] == [1, 0.5, 1, 2, 50, 500]


def test_lines_have_gaps_tips_and_a_legend() -> None:
    root = ElementTree.fromstring(line_chart(LINES, x_label="scale", y_label="attainment", x_log=True, heading="H"))
    assert len(root.findall(f"{SVG}polyline")) == 1
    tips = ["".join(circle.itertext()) for circle in root.iter(f"{SVG}circle")]
    assert sorted(tips) == [
        "<ours>, 1: 0.5",
        "<ours>, 4: 1",
        *(f"other & more, {x}: {y}" for x, y in ((1, 0.2), (2, 0.3), (4, 0.4))),
    ]
    assert {"<ours>", "other & more", "H"} <= {text.text for text in root.iter(f"{SVG}text")}
    alone = ElementTree.fromstring(line_chart(LINES[:1], x_label="x", y_label="y", dots=False))
    # A point between two gaps is still seen, and one line needs no legend.
    assert len(alone.findall(f"{SVG}circle")) == 2
    assert "<ours>" not in {text.text for text in alone.iter(f"{SVG}text")}


def test_a_value_beyond_the_axis_stays_on_the_picture() -> None:
    picture = line_chart([Series(name="a", x=[0, 1], y=[-5, 7])], x_label="x", y_label="y", y_low=0, y_high=1)
    heights = [float(circle.get("cy", "nan")) for circle in ElementTree.fromstring(picture).iter(f"{SVG}circle")]
    assert all(0 < y < 240 for y in heights)


def test_bars_and_cells_tell_their_values() -> None:
    bars = bar_chart(["1", "2"], [3, 0], x_label="groups", y_label="adapters", tips=["one <group>: 3", "two: 0"])
    assert _tips(bars) == ["one <group>: 3", "two: 0"]
    values = np.array([[0.0, 2.0], [4.0, 0.0]])
    cells = heat_map(
        ["a", "<b>"],
        values,
        x_label="groups",
        columns=["g0", "g1"],
        tip=lambda row, column: f"{row},{column}",
        kind=lambda row, column: "warm" if row else "heat",
    )
    rects = list(ElementTree.fromstring(cells).iter(f"{SVG}rect"))
    assert [(rect.get("class"), rect.get("fill-opacity"), "".join(rect.itertext())) for rect in rects] == [
        ("heat", "0.55", "0,1"),
        ("warm", "1.00", "1,0"),
    ]


def test_grouped_bars_tell_side_group_and_value() -> None:
    sides = [Bars(name="<ours>", values=[12345.6, math.nan]), Bars(name="theirs", values=[0.0, 1200.5])]
    root = ElementTree.fromstring(grouped_bars(["few", "many\nmore"], sides, y_label="tokens/s", x_label="adapters"))
    bars = [rect for rect in root.iter(f"{SVG}rect") if rect.find(f"{SVG}title") is not None]
    assert ["".join(bar.itertext()) for bar in bars] == [
        "<ours>, few: 12,346",
        "theirs, few: 0",
        "theirs, many more: 1,200",
    ]
    assert [bar.get("class") for bar in bars] == ["f0", "f1", "f1"]
    assert float(bars[0].get("height", 0)) > 5 * float(bars[2].get("height", 0)) > 0
    words = [text.text for text in root.iter(f"{SVG}text")]
    assert {"12,346", "1,200", "few", "many", "more", "adapters", "tokens/s", "<ours>", "theirs"} <= set(words)
    # One side needs no legend, and nothing at all is still a picture.
    assert "a" not in [t.text for t in ElementTree.fromstring(_one_side("a")).iter(f"{SVG}text")]
    ElementTree.fromstring(grouped_bars([], [], y_label="y"))


def _one_side(name: str) -> str:
    return grouped_bars(["g"], [Bars(name=name, values=[5.0])], y_label="y", y_high=1.0)


def test_a_page_is_whole_and_fetches_nothing() -> None:
    text = page(
        "<Plan>",
        [
            figures([("93 %", "attainment")]),
            section("S", table(["name", "n"], [["<a>", 1.23456], ["b", None]], strong=0), note="n & n"),
            paragraph("p"),
            folded("more", bullets(["<li>"])),
            line_chart(LINES, x_label="x", y_label="y"),
        ],
    )
    assert not re.search(r"(src|href)=|url\(|@import|<script", text)
    assert "prefers-color-scheme:dark" in text
    for escaped in ("&lt;Plan&gt;", "&lt;a&gt;", "&lt;li&gt;", "n &amp; n"):
        assert escaped in text
    assert '<td class="number">1.235</td>' in text
    assert '<td class="number">–</td>' in text
    body = text[text.index("<body>") : text.index("</html>")]
    assert ElementTree.fromstring(body).tag == "body"


def test_a_picture_becomes_a_file_of_its_own() -> None:
    picture = line_chart(LINES, x_label="x", y_label="y")
    ElementTree.fromstring(standalone(picture))
    data = png(picture, width=480)
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">I", data[16:20]) == (480,)
    assert png(line_chart(LINES[:1], x_label="x", y_label="y"), width=480) != data


def test_no_png_without_a_font(monkeypatch: pytest.MonkeyPatch) -> None:
    render = resvg_py.svg_to_bytes
    monkeypatch.setattr(resvg_py, "svg_to_bytes", lambda **options: render(**options, skip_system_fonts=True))
    with pytest.raises(Unavailable, match="none is installed; write an SVG"):
        _font.__wrapped__()
