"""What the steps tell about themselves: plain dictionaries that can be saved as JSON."""

from __future__ import annotations

from decimal import Decimal
from typing import Any, TypeAlias

import narwhals.stable.v2 as nw

Report: TypeAlias = dict[str, Any]


def collect_rows(frame: nw.LazyFrame[Any]) -> list[dict[str, Any]]:
    """Compute a small frame and return its rows as dictionaries of Python values."""
    return [
        {name: _plain(nw.to_py_scalar(value)) for name, value in row.items()}
        for row in frame.collect().rows(named=True)
    ]


def _plain(value: Any) -> Any:
    """Sums of DuckDB's are decimals, as they may be longer than 64 bits."""
    return int(value) if isinstance(value, Decimal) else value


def counts(row: dict[str, Any]) -> Report:
    """Pick the ``rows``, ``users`` and ``items`` of a computed row."""
    return {name: int(row[name]) for name in ("rows", "users", "items")}
