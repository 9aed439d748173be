from __future__ import annotations

import re

import polars as pl
import pyarrow as pa
import pytest
from kedro.io import DatasetError
from pyarrow import parquet

from sce_pipeline.datasets import parquet_bombs
from sce_pipeline.datasets.parquet_bombs import find_bomb
from sce_pipeline.datasets.raw_table import RawTableDataset


@pytest.fixture
def file(tmp_path):
    return tmp_path / "interactions.parquet"


def write(file, row_group_size=10, **columns):
    parquet.write_table(pa.table(columns), file, row_group_size=row_group_size)


def test_a_log_is_no_bomb(file):
    write(file, user=list("abcdefghijkl"), comment=["x" * 3000] * 12)
    assert find_bomb(file) is None


def test_a_small_file_of_one_endless_value_is_refused_before_it_is_read(file):
    write(file, user=["u", "v", "w"], item=["a", "b" * 2**25, None])
    assert file.stat().st_size < 2**21
    message = (
        r"interactions\.parquet would fill the memory: row group 0, counted from 0, has 11,\d+,"
    )
    with pytest.raises(
        DatasetError, match=message + r"\d+ bytes a value in the column 'item'\. If"
    ):
        RawTableDataset(filepath=str(file.with_suffix(""))).load()


def test_row_groups_have_their_bounds(file, monkeypatch):
    write(file, user=["u" * 100] * 25, item=list(range(25)))
    monkeypatch.setattr(parquet_bombs, "MOST_BYTES", 90)
    found = r"row group 0, counted from 0, has \d+ bytes in the column 'user', more than 90"
    assert re.fullmatch(found, find_bomb(file))
    monkeypatch.setattr(parquet_bombs, "MOST_BYTES", 10**6)
    monkeypatch.setattr(parquet_bombs, "MOST_ROWS", 9)
    assert find_bomb(file) == "row group 0, counted from 0, has 10 rows, more than 9"
    monkeypatch.setattr(parquet_bombs, "MOST_ROWS", 10)
    assert find_bomb(file) is None


def test_what_is_no_parquet_is_left_to_whoever_reads_it(file):
    file.write_bytes(b"PAR1 and then some PAR1")
    assert find_bomb(file) is None


def test_files_without_rows_or_columns_have_no_bomb(file):
    pl.DataFrame({"user": []}).write_parquet(file)
    assert find_bomb(file) is None
    pl.DataFrame().write_parquet(file)
    assert find_bomb(file) is None
