"""The page: title, figures, charts; nothing that a browser would have to fetch."""

import numpy as np

from loraplex.pages.bar_chart import bar_chart
from loraplex.pages.heat_map import heat_map
from loraplex.pages.line_chart import Series, line_chart
from loraplex.pages.page import page, paragraph, section
from loraplex.pages.scale import short
from loraplex.traces.plot.collect import RATE_BINS, LengthHistogram, TracePictures


def render(pictures: TracePictures, *, title: str) -> str:
    """One HTML document, UTF-8."""
    start_s, end_s = pictures.start_s, pictures.end_s
    step_s = max(end_s - start_s, 1e-9) / RATE_BINS
    rest = f", {pictures.others:,} requests of others left out" if pictures.others else ""
    rate = Series(
        name="requests per second",
        x=(start_s + (np.arange(RATE_BINS) + 0.5) * step_s).tolist(),
        y=(pictures.rate / step_s).tolist(),
    )
    adapters = heat_map(
        pictures.adapters,
        pictures.heat,
        x_label="seconds",
        x_range=(start_s, end_s),
        is_log=True,
        tip=lambda row, column: f"{pictures.adapters[row]}: {pictures.heat[row, column]}",
    )
    return page(
        title,
        [
            paragraph(f"{pictures.requests:,} requests from second {start_s:,.4g} to {end_s:,.4g}."),
            section("Requests per second", line_chart([rate], x_label="seconds", y_label="requests/s", dots=False)),
            section(
                "Adapters over time",
                adapters,
                note=f"The {len(pictures.adapters)} busiest{rest}. The stronger the more, on a logarithmic scale.",
            ),
            _lengths("Prompt tokens", pictures.prompt_tokens),
            _lengths("Output tokens", pictures.output_tokens),
        ],
    )


def _lengths(title: str, histogram: LengthHistogram | None) -> str:
    if histogram is None:
        return section(title, paragraph("The trace does not say."))
    edges, counts = histogram.edges.tolist(), histogram.counts.tolist()
    tips = [f"{edges[i]:.4g} to {edges[i + 1]:.4g}: {count}" for i, count in enumerate(counts)]
    chart = bar_chart(
        [short(round(edge, 1)) for edge in edges], counts, x_label="tokens", y_label="requests", tips=tips
    )
    return section(title, chart)
