"""What the steps tell about themselves: plain dictionaries that can be saved as JSON."""

from __future__ import annotations

from typing import Any, TypeAlias

import narwhals.stable.v2 as nw

Report: TypeAlias = dict[str, Any]


def collect_rows(frame: nw.LazyFrame[Any]) -> list[dict[str, Any]]:
    """Compute a small frame and return its rows as dictionaries of Python values."""
    return [
        {name: nw.to_py_scalar(value) for name, value in row.items()}
        for row in frame.collect().rows(named=True)
    ]


def counts(row: dict[str, Any]) -> Report:
    """Pick the ``rows``, ``users`` and ``items`` of a computed row."""
    return {name: int(row[name]) for name in ("rows", "users", "items")}
