"""What the steps tell about themselves: plain dictionaries that can be saved as JSON."""

from __future__ import annotations

from decimal import Decimal
from typing import Any, TypeAlias

import narwhals.stable.v2 as nw

from sce_pipeline.interactions.engines import collect_all

Report: TypeAlias = dict[str, Any]


def collect_rows(frame: nw.LazyFrame[Any]) -> list[dict[str, Any]]:
    """Compute a small frame and return its rows as dictionaries of Python values."""
    return _rows(frame.collect())


def counts(row: dict[str, Any]) -> Report:
    """Pick the ``rows``, ``users`` and ``items`` of a computed row."""
    return {name: int(row[name]) for name in ("rows", "users", "items")}


def tally(
    log: nw.LazyFrame[Any], by: str, *, rows: nw.Expr | None = None, **more: nw.Expr
) -> dict[str, Report]:
    """Count ``rows``, distinct ``users`` and ``items`` for each value of a column, and more.

    Distinct ones are counted apart: to count them beside something else, engines hold all of them.

    Args:
        log: Columns user, item and ``by``, a text.
        by: The column.
        rows: What counts the rows, if not each row is one.
        more: What else is told of each value.
    """
    of_rows = log.group_by(by).agg(rows=nw.len() if rows is None else rows, **more).sort(by)
    distinct = [
        log.select(by, column).unique().group_by(by).agg(nw.len().alias(name))
        for name, column in {"users": "user", "items": "item"}.items()
    ]
    first, *others = collect_all([of_rows, *distinct])
    tallies = {row.pop(by): row for row in _rows(first)}
    for other in others:
        for row in _rows(other):
            tallies[row.pop(by)] |= row
    return tallies


def _rows(frame: nw.DataFrame[Any]) -> list[dict[str, Any]]:
    return [
        {name: _plain(nw.to_py_scalar(value)) for name, value in row.items()}
        for row in frame.rows(named=True)
    ]


def _plain(value: Any) -> Any:
    """Sums of DuckDB's are decimals, as they may be longer than 64 bits."""
    return int(value) if isinstance(value, Decimal) else value
