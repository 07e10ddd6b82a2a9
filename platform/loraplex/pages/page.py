"""The document: head, style, tables, figures. Everything a page shows is in it, nothing is fetched."""

from collections.abc import Sequence
from html import escape

from loraplex.pages import style


def page(title: str, parts: Sequence[str]) -> str:
    """One HTML document, UTF-8."""
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
        f"<style>{style.for_page()}</style>"
    )
    body = f"<h1>{escape(title)}</h1>{''.join(parts)}"
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def section(title: str, *parts: str, note: str = "") -> str:
    words = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<h2>{escape(title)}</h2>{words}{''.join(parts)}"


def subsection(title: str, *parts: str) -> str:
    return f"<h3>{escape(title)}</h3>{''.join(parts)}"


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def bullets(lines: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"


def figures(pairs: Sequence[tuple[str, str]]) -> str:
    """Large numbers side by side: (number, what it is)."""
    cells = "".join(f"<div><b>{escape(number)}</b><span>{escape(what)}</span></div>" for number, what in pairs)
    return f'<div class="figures">{cells}</div>'


def folded(summary: str, *parts: str) -> str:
    """Shown after a click."""
    return f"<details><summary>{escape(summary)}</summary>{''.join(parts)}</details>"


def table(columns: Sequence[str], rows: Sequence[Sequence[str | float | None]], *, strong: int = -1) -> str:
    """Numbers stand to the right, rounded to four digits; None is a dash. ``strong``: a row that stands out."""
    numbers = [
        bool(rows) and all(row[i] is None or isinstance(row[i], int | float) for row in rows)
        for i in range(len(columns))
    ]
    kinds = [' class="number"' if is_number else "" for is_number in numbers]
    head = "".join(f"<th{kind}>{escape(name)}</th>" for name, kind in zip(columns, kinds, strict=True))
    body = "".join(
        ('<tr class="strong">' if index == strong else "<tr>")
        + "".join(f"<td{kind}>{escape(shown(cell))}</td>" for cell, kind in zip(row, kinds, strict=True))
        + "</tr>"
        for index, row in enumerate(rows)
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def shown(cell: str | float | None) -> str:
    if cell is None or (isinstance(cell, float) and cell != cell):
        return "–"
    if isinstance(cell, float):
        return f"{cell:,.0f}" if abs(cell) >= 1000 else f"{cell:.4g}"
    return f"{cell:,}" if isinstance(cell, int) else cell
