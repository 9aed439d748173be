from __future__ import annotations

import narwhals.stable.v2 as nw
import polars as pl
import pyarrow as pa
import pytest


def pytest_collection_modifyitems(config, items):
    """Leave out tests of hundreds of examples on Spark, which takes a second for each."""
    if not config.getoption("--on-spark"):
        return
    dropped = [item for item in items if hasattr(item.function, "hypothesis")]
    items[:] = [item for item in items if item not in dropped]
    config.hook.pytest_deselected(items=dropped)


@pytest.fixture(autouse=True)
def _on_spark(request, monkeypatch):
    """With ``--on-spark``, let Spark do what the tests have a lazy Polars frame for."""
    if not request.config.getoption("--on-spark"):
        return
    spark, from_native = request.getfixturevalue("spark"), nw.from_native

    def hand_over(native, **options):
        if isinstance(native, pl.LazyFrame):
            try:
                native = spark.createDataFrame(native.collect().to_arrow())
            except pa.ArrowInvalid as error:
                pytest.skip(f"Spark cannot hold it: {error}")
        return from_native(native, **options)

    monkeypatch.setattr(nw, "from_native", hand_over)
