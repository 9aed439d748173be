"""What Narwhals has no word for, an engine at a time."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import narwhals.stable.v2 as nw


def collect_all(frames: list[nw.LazyFrame[Any]]) -> list[nw.DataFrame[Any]]:
    """Compute frames that are made of the same one; Polars computes that once."""
    if all(frame.implementation.is_polars() for frame in frames):
        import polars as pl  # noqa: PLC0415 - other engines do without it

        return [nw.from_native(found) for found in pl.collect_all([f.to_native() for f in frames])]
    return [frame.collect() for frame in frames]


def hold(frame: nw.LazyFrame[Any]) -> nw.LazyFrame[Any]:
    """Compute a frame now, so that what is made of it does not compute it again.

    Polars holds it in memory, others as :func:`spill` does.
    """
    return frame.collect().lazy() if frame.implementation.is_polars() else spill(frame)


def spill(frame: nw.LazyFrame[Any]) -> nw.LazyFrame[Any]:
    """Compute a frame of any size now where the engine has room for it besides the memory.

    Spark's executors have, and DuckDB: they take memory and then disks. Polars would hold all of it
    in memory, and streams through it again.
    """
    if frame.implementation.is_duckdb():
        name, native = f"held_{uuid4().hex}", frame.to_native()
        native.query("frame", f"CREATE TEMP TABLE {name} AS FROM frame")
        return nw.from_native(native.query("frame", f"FROM {name}"))
    return end_plan(frame)


def end_plan(frame: nw.LazyFrame[Any]) -> nw.LazyFrame[Any]:
    """Spill a frame where plans grow: Spark writes conditions out down to the first columns."""
    if frame.implementation.is_pyspark():
        return nw.from_native(frame.to_native().localCheckpoint())
    return frame
