from __future__ import annotations

import polars as pl
import pytest
from kedro.io import DatasetError

from sce_pipeline.datasets.new_table import NewTableDataset
from sce_pipeline.datasets.raw_table import RawTableDataset


def test_what_is_written_is_read_as_a_raw_table(tmp_path):
    file = tmp_path / "log" / "interactions.parquet"
    dataset = NewTableDataset(filepath=str(file))
    assert not dataset.exists()
    frame = pl.DataFrame({"userid": [1, 2], "itemid": [3, 4]})
    dataset.save(frame.lazy())
    assert dataset.exists()
    table = RawTableDataset(filepath=str(file.with_suffix(""))).load().collect()
    assert table.drop("row").equals(frame)
    assert [path.name for path in file.parent.iterdir()] == ["interactions.parquet"]


@pytest.mark.parametrize("suffix", ["csv", "csv.gz", "parquet"])
def test_no_table_is_written_over(tmp_path, suffix):
    existing = tmp_path / f"interactions.{suffix}"
    existing.write_text("mine")
    dataset = NewTableDataset(filepath=str(tmp_path / "interactions.parquet"))
    with pytest.raises(DatasetError, match=f"already has interactions.{suffix}"):
        dataset.save(pl.LazyFrame({"userid": [1]}))
    assert existing.read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 1


TABLE = pl.DataFrame({"userid": ["a", None, "c"], "timestamp": [1.0, float("nan"), None]})


def test_the_same_table_again_is_no_error(tmp_path, caplog):
    file = tmp_path / "interactions.parquet"
    dataset = NewTableDataset(filepath=str(file))
    dataset.save(TABLE)
    before = file.stat().st_mtime_ns
    with caplog.at_level("INFO"):
        dataset.save(TABLE.lazy())
    assert f"{file} is there already" in caplog.text
    assert file.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "other",
    [
        TABLE.reverse(),
        TABLE.head(2),
        pl.concat([TABLE, TABLE.head(1)]),
        TABLE.with_columns(userid=pl.Series(["a", "b", "c"])),
        TABLE.with_columns(pl.col("timestamp").cast(pl.Float32)),
        TABLE.rename({"userid": "itemid"}),
        TABLE.with_columns(more=1),
        TABLE.clear(),
    ],
    ids=["order", "fewer", "more", "value", "type", "name", "column", "empty"],
)
def test_another_table_of_the_name_stays(tmp_path, other):
    file = tmp_path / "interactions.parquet"
    other.write_parquet(file)
    before = file.read_bytes()
    with pytest.raises(DatasetError, match=r"already has interactions\.parquet"):
        NewTableDataset(filepath=str(file)).save(TABLE.lazy())
    assert file.read_bytes() == before


def test_the_same_table_beside_another_format_is_refused(tmp_path):
    dataset = NewTableDataset(filepath=str(tmp_path / "interactions.parquet"))
    dataset.save(TABLE)
    (tmp_path / "interactions.csv").write_text("mine")
    with pytest.raises(DatasetError, match=r"interactions\.csv, interactions\.parquet"):
        dataset.save(TABLE)


def test_a_failure_leaves_no_part_of_a_table(tmp_path):
    def fail(frame):
        raise RuntimeError("no more")

    dataset = NewTableDataset(filepath=str(tmp_path / "interactions.parquet"))
    with pytest.raises(DatasetError, match="no more"):
        dataset.save(pl.LazyFrame({"userid": [1]}).map_batches(fail))
    assert not list(tmp_path.iterdir())
    with pytest.raises(DatasetError, match="never read"):
        dataset.load()
