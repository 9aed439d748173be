from __future__ import annotations

import polars as pl
import pytest
from kedro.io import DatasetError

from sce_pipeline.datasets.streamed_table import StreamedTableDataset


def test_a_frame_is_written_and_read_again_over_an_older_one(tmp_path):
    table = StreamedTableDataset(filepath=str(tmp_path / "new/table.parquet"))
    assert not table.exists()
    for values in ([1, 2], [3]):
        table.save(pl.LazyFrame({"a": values}))
        assert table.load().collect()["a"].to_list() == values
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["table.parquet"]


def test_a_failure_leaves_the_older_table(tmp_path):
    table = StreamedTableDataset(filepath=str(tmp_path / "table.parquet"))
    table.save(pl.LazyFrame({"a": ["1"]}))
    with pytest.raises(DatasetError):
        table.save(pl.LazyFrame({"a": ["x"]}).cast(pl.Int64))
    assert table.load().collect()["a"].to_list() == ["1"]
    assert [file.name for file in tmp_path.iterdir()] == ["table.parquet"]


def test_an_absent_table_is_named(tmp_path):
    with pytest.raises(DatasetError, match=r"There is no .*table\.parquet"):
        StreamedTableDataset(filepath=str(tmp_path / "table.parquet")).load()
