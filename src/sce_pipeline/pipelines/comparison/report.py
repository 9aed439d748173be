"""The comparison as one page of HTML that needs no network."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

import polars as pl
from plotly import graph_objects as go

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1600px; padding: 0 1rem }
h1, h2 { font-weight: 600 }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
th, td { border-bottom: 1px solid #ddd; padding: 4px 6px; text-align: left; white-space: nowrap }
td.number, th.number { text-align: right }
"""


def render_page(title: str, sections: Mapping[str, str]) -> str:
    """Lay sections of HTML out under their headings, with the script of all figures once.

    Args:
        title: The heading of the page, as plain text.
        sections: HTML by the plain text of its heading.
    """
    from plotly.offline import get_plotlyjs  # noqa: PLC0415 - imports all of IPython

    body = "\n".join(
        f"<section><h2>{escape(heading)}</h2>\n{html}</section>"
        for heading, html in sections.items()
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n"
        f"<script>{get_plotlyjs()}</script></head>\n"
        f"<body><h1>{escape(title)}</h1>\n{body}\n</body></html>\n"
    )


def render_table(frame: pl.DataFrame) -> str:
    """Write a frame as an HTML table; columns without any value are left out."""
    frame = frame[[column.name for column in frame if column.null_count() < len(frame)]]
    numbers = {name for name, dtype in frame.schema.items() if dtype.is_numeric()}

    def cell(tag: str, name: str, text: str) -> str:
        kind = ' class="number"' if name in numbers else ""
        return f"<{tag}{kind}>{escape(text)}</{tag}>"

    head = "".join(cell("th", name, name.replace("_", " ")) for name in frame.columns)
    rows = (
        "".join(cell("td", name, _write(name, value)) for name, value in row.items())
        for row in frame.iter_rows(named=True)
    )
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>\n"
    )


def render_figure(figure: go.Figure) -> str:
    """Write a figure as HTML that counts on the page's script."""
    return figure.to_html(full_html=False, include_plotlyjs=False, default_height="480px")


def render_paragraph(text: str) -> str:
    """Write a paragraph of plain text."""
    return f"<p>{escape(text)}</p>\n"


def _write(name: str, value: Any) -> str:
    if value is None:
        return "–"
    if not isinstance(value, float):
        return str(value)
    if "seconds" in name or "memory" in name:
        return f"{value:,.1f}" if value >= 10 else f"{value:.3g}"  # noqa: PLR2004
    return f"{value:.4f}"
