"""Exact quantiles of more numbers than fit into memory."""

from __future__ import annotations

from typing import Any

import narwhals.stable.v2 as nw
import numpy as np

from sce_pipeline.interactions.reports import collect_rows

BINS = 2**18
"""Bins that a range of numbers is cut into, each time it is gone through."""


def nearest_quantile(numbers: nw.LazyFrame[Any], quantile: float) -> int:
    """Return the number nearest to a quantile, as NumPy's method "nearest" does.

    That rounds halves as the papers' pandas does; the engines have rules of their own. The numbers
    are counted in bins, then those of the bin it lies in, and so on.

    Args:
        numbers: One column ``number`` (Int64), at least one row.
        quantile: Share of the numbers that lie below, in [0, 1].
    """
    number = nw.col("number")
    (known,) = collect_rows(numbers.select(rows=nw.len(), low=number.min(), high=number.max()))
    low, high = int(known["low"]), int(known["high"])
    place = int(np.around((known["rows"] - 1) * quantile))
    while low < high:
        width = -(-(high - low + 1) // BINS)
        bins = (
            numbers.filter((number >= low) & (number <= high))
            .select(bin=(number - low) // width)
            .group_by("bin")
            .agg(rows=nw.len())
            .sort("bin")
            .collect()
        )
        ends = np.cumsum(bins["rows"].to_numpy())
        at = int(np.searchsorted(ends, place, side="right"))
        place -= int(ends[at - 1]) if at else 0
        low += int(bins["bin"].to_numpy()[at]) * width
        high = min(low + width - 1, high)
    return low
