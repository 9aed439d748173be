"""Data processing in the environment spark, beside that of the default environment."""

from __future__ import annotations

from functools import partial

import polars as pl
import pytest
from kedro.io import DatasetError
from prepared_data import LOGS, check_what_is_set_aside, prepare_twice

from sce_pipeline.datasets.raw_table import RawTableDataset


@pytest.mark.usefixtures("spark")
@pytest.mark.parametrize("dataset", LOGS)
def test_spark_gives_what_polars_gives(project, dataset):
    prepare_twice(project, dataset, "spark")
    parts = project.path("05_model_input", dataset, "encoded_interactions.parquet").iterdir()
    assert [file.suffix for file in parts] == [".parquet", ".parquet"]


def make_raw_table(folder, **options):
    from sce_pipeline.datasets.spark_raw_table import SparkRawTableDataset  # noqa: PLC0415

    return SparkRawTableDataset(
        filepath=str(folder / "interactions"),
        staging={"filepath": str(folder / "staging/interactions.parquet")},
        **options,
    )


def read(table):
    return pl.from_arrow(table.load().toArrow())


@pytest.mark.usefixtures("spark")
def test_rows_of_a_folder_are_numbered_file_after_file(tmp_path):
    folder = tmp_path / "interactions.parquet"
    folder.mkdir()
    for place, length in enumerate([1, 300, 2]):
        values = pl.int_range(place * 1000, place * 1000 + length, eager=True)
        file = folder / f"part-{place}.parquet"
        pl.DataFrame({"value": values}).write_parquet(file, row_group_size=7)
    assert read(make_raw_table(tmp_path)).sort("row").rows() == [
        (value, row) for row, value in enumerate([0, *range(1000, 1300), 2000, 2001])
    ]


@pytest.mark.usefixtures("spark")
def test_text_is_read_as_without_spark(tmp_path):
    (tmp_path / "interactions.csv").write_bytes(b'a,b\n1,"x\r\ny"\n\n"",2\n3\n')
    expected = RawTableDataset(filepath=str(tmp_path / "interactions")).load().collect()
    assert read(make_raw_table(tmp_path)).sort("row").equals(expected.select("row", "a", "b"))


@pytest.mark.usefixtures("spark")
def test_malformed_records_are_set_aside_as_without_spark(tmp_path):
    check_what_is_set_aside(tmp_path, partial(make_raw_table, tmp_path))


@pytest.mark.usefixtures("spark")
def test_a_folder_with_columns_of_names_that_are_given_is_refused(tmp_path):
    pl.DataFrame({"malformed": [True]}).write_parquet(tmp_path / "interactions.parquet")
    assert read(make_raw_table(tmp_path))["malformed"].to_list() == [True]
    with pytest.raises(DatasetError, match="rename its column 'malformed'"):
        make_raw_table(tmp_path, set_aside_malformed=True).load()


@pytest.mark.usefixtures("spark")
def test_what_is_no_table_or_more_than_one_is_refused(tmp_path):
    assert make_raw_table(tmp_path, optional=True).load() is None
    with pytest.raises(DatasetError, match="No table 'interactions'"):
        make_raw_table(tmp_path).load()
    pl.DataFrame({"row": [1]}).write_parquet(tmp_path / "interactions.parquet")
    with pytest.raises(DatasetError, match="rename its column 'row'"):
        make_raw_table(tmp_path).load()
    (tmp_path / "interactions.csv").write_bytes(b"a,b\n1,2\n")
    with pytest.raises(DatasetError, match=r"found interactions.csv and interactions.parquet"):
        make_raw_table(tmp_path).load()


def test_without_spark_its_environment_says_what_to_install(project, monkeypatch):
    monkeypatch.setattr("sce_pipeline.spark.find_spec", lambda _: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'sce-pipeline\[spark\]'"):
        project.run(env="spark", pipelines=["data_processing"])
