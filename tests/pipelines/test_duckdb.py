"""Data processing in the environment duckdb, beside that of the default environment."""

from __future__ import annotations

import narwhals.stable.v2 as nw
import polars as pl
import pytest
from kedro.io import DatasetError
from prepared_data import LOGS, check_what_is_set_aside, prepare_twice

from sce_pipeline.datasets.duckdb_tables import DuckDBRawTableDataset, DuckDBTableDataset, connect
from sce_pipeline.datasets.raw_table import RawTableDataset
from sce_pipeline.interactions.cleaning import clean_interactions
from sce_pipeline.parameters import Columns


@pytest.fixture
def engine(tmp_path):
    return {"memory_limit": "500MB", "spill_folder": str(tmp_path / "spill")}


@pytest.fixture
def make_raw_table(tmp_path, engine):
    def make(**options):
        return DuckDBRawTableDataset(
            filepath=str(tmp_path / "interactions"),
            staging=str(tmp_path / "staging/interactions.parquet"),
            engine=engine,
            **options,
        )

    return make


@pytest.mark.parametrize("dataset", LOGS)
def test_duckdb_gives_what_polars_gives(project, dataset):
    prepare_twice(project, dataset, "duckdb")


def test_rows_of_parquet_are_numbered_as_they_lie(tmp_path, make_raw_table):
    file = tmp_path / "interactions.parquet"
    pl.DataFrame({"value": range(300, 0, -1)}).write_parquet(file, row_group_size=7)
    found = make_raw_table().load().pl().sort("row")
    assert found.rows() == [(300 - row, row) for row in range(300)]


@pytest.mark.parametrize("dtype", [pl.Float32, pl.Float64])
def test_nan_is_missing_although_the_file_s_least_and_greatest_value_know_of_none(
    tmp_path, make_raw_table, dtype
):
    nan, ids = float("nan"), [1.0, 2.0, 3.0, 4.0]
    log = pl.DataFrame(
        {"user": [nan, *ids[1:]], 'the "item"': [1.0, nan, 2.5, 2.0], "time": [7.0, 8.0, nan, 9.0]},
        schema_overrides={"user": dtype, 'the "item"': dtype},
    )
    log.write_parquet(tmp_path / "interactions.parquet")
    plain = RawTableDataset(filepath=str(tmp_path / "interactions"))
    columns = Columns(user="user", item='the "item"', timestamp="time")

    def clean(table):
        kept, rejected, report = clean_interactions(nw.from_native(table).lazy(), columns)
        return kept.collect("polars").rows(), rejected.collect("polars").rows(), report

    kept, rejected, report = clean(make_raw_table().load())
    assert (kept, sorted(rejected), report) == clean(plain.load())
    assert [row[4] for row in sorted(rejected)] == [
        "missing user",
        "missing item",
        "missing timestamp",
    ]


def test_text_is_read_as_without_duckdb(tmp_path, make_raw_table):
    (tmp_path / "interactions.csv").write_bytes(b'a,b\n1,"x\r\ny"\n\n"",2\n3\n')
    expected = RawTableDataset(filepath=str(tmp_path / "interactions")).load().collect()
    assert make_raw_table().load().pl().sort("row").equals(expected)


def test_malformed_records_are_set_aside_as_without_duckdb(tmp_path, make_raw_table):
    check_what_is_set_aside(tmp_path, make_raw_table)


def test_what_is_no_table_or_more_than_one_is_refused(tmp_path, make_raw_table):
    assert make_raw_table(optional=True).load() is None
    with pytest.raises(DatasetError, match="No table 'interactions'"):
        make_raw_table().load()
    pl.DataFrame({"row": [1]}).write_parquet(tmp_path / "interactions.parquet")
    with pytest.raises(DatasetError, match="rename its column 'row'"):
        make_raw_table().load()
    (tmp_path / "interactions.csv").write_bytes(b"a,b\n1,2\n")
    with pytest.raises(DatasetError, match=r"found interactions.csv and interactions.parquet"):
        make_raw_table().load()


def test_a_table_is_whole_or_as_it_was(tmp_path, engine):
    table = DuckDBTableDataset(filepath=str(tmp_path / "folder/table.parquet"), engine=engine)
    with pytest.raises(DatasetError, match=r"There is no .*table.parquet: run what writes it"):
        table.load()
    connection = connect(**engine)
    table.save(connection.sql("select 7 as value"))
    with pytest.raises(DatasetError, match="Conversion Error"):
        table.save(connection.sql("select cast(text as int) as value from (values ('x')) t(text)"))
    assert table.load().fetchall() == [(7,)]
    assert [file.name for file in (tmp_path / "folder").iterdir()] == ["table.parquet"]


def test_more_than_fits_into_memory_goes_to_the_disk_until_the_process_ends(engine):
    connection = connect(**engine | {"memory_limit": "40MB"})
    rows = connection.sql("select hash(i) as number, i from range(3000000) t(i) order by number")
    rows.create("in_order")  # 48 MB
    assert connection.sql("from duckdb_temporary_files()").fetchall()
    assert connection.sql("select max(i) from in_order").fetchall() == [(2_999_999,)]


def test_without_duckdb_it_is_said_what_to_install(engine, monkeypatch):
    monkeypatch.setattr("sce_pipeline.datasets.duckdb_tables.find_spec", lambda _: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'sce-pipeline\[duckdb\]'"):
        connect(**engine)
