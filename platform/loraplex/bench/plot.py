"""A bar chart as one SVG, without a library: a result's picture must open anywhere. Called by ``sweep``."""

from collections.abc import Sequence
from html import escape

_BAR, _GAP, _LEFT, _WIDTH, _TOP = 20, 8, 170, 620, 64


def bar_chart(title: str, unit: str, bars: Sequence[tuple[str, float, str]]) -> str:
    """``bars``: (name, length, note), drawn from the top."""
    height = _TOP + len(bars) * (_BAR + _GAP) + _GAP
    longest = max((length for _, length, _ in bars), default=0.0) or 1.0
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LEFT + _WIDTH + 180}" height="{height}" '
        'font-family="sans-serif" font-size="13">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="12" y="24" font-size="16">{escape(title)}</text>',
        f'<text x="{_LEFT}" y="48" fill="#666">{escape(unit)}</text>',
    ]
    for index, (name, length, note) in enumerate(bars):
        y = _TOP + index * (_BAR + _GAP)
        width = max(1.0, _WIDTH * length / longest)
        lines += [
            f'<text x="{_LEFT - 8}" y="{y + 15}" text-anchor="end">{escape(name)}</text>',
            f'<rect x="{_LEFT}" y="{y}" width="{width:.1f}" height="{_BAR}" fill="#4878a8"/>',
            f'<text x="{_LEFT + width + 6:.1f}" y="{y + 15}">{length:,.0f} <tspan fill="#666">{escape(note)}</tspan>'
            "</text>",
        ]
    return "\n".join([*lines, "</svg>", ""])
