"""What Narwhals has no word for, an engine at a time."""

from __future__ import annotations

from typing import Any

import narwhals.stable.v2 as nw


def hold(frame: nw.LazyFrame[Any]) -> nw.LazyFrame[Any]:
    """Compute a frame now, so that what is made of it does not compute it again.

    Polars holds it in memory, Spark as :func:`spill` does; other engines compute it again.
    """
    if frame.implementation.is_polars():
        return frame.collect().lazy()
    return spill(frame)


def spill(frame: nw.LazyFrame[Any]) -> nw.LazyFrame[Any]:
    """Compute a frame of any size now where the engine has room for it besides the memory.

    Spark's executors have: it takes their memory and then their disks. It also ends a plan, whose
    conditions Spark writes out down to the columns it began with. Polars would hold all of it in
    memory, and streams through it again.
    """
    if frame.implementation.is_pyspark():
        return nw.from_native(frame.to_native().localCheckpoint())
    return frame
