"""Data processing in the environment spark, beside that of the default environment."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from kedro.framework.session import KedroSession
from kedro.io import DatasetError

from helpers import ROOT
from sce_pipeline.datasets.raw_table import RawTableDataset

SHARED = ROOT.parent / "shared/data"

LOGS = {
    "movielens_small": ROOT / "data/01_raw/movielens_small/interactions.csv.gz",
    "amazon_beauty": SHARED / "amazon_beauty.csv.gz",
    "gowalla": SHARED / "gowalla_sample.csv.gz",
    "yelp": SHARED / "yelp.csv.gz",
}

TABLES = [
    "filtered_interactions",
    "split_interactions",
    "encoded_interactions",
    "items",
    "users",
    "interactions",
]

REPORTS = ["cleaning_report", "filter_report", "split_report", "sequence_report", "data_summary"]

SEQUENCES = ["train_sequences", "validation_sequences", "test_sequences", "item_popularity"]


def load(project, dataset):
    """What there is of a data set, read as the default environment does, whoever wrote it."""
    with KedroSession.create(project.folder, runtime_params={"dataset": dataset}) as session:
        catalog = session.load_context().catalog
        tables = {name: catalog.load(name).lazy().collect() for name in TABLES}
        tables["interactions"] = tables["interactions"].sort("row")  # the others are in order
        rejected = project.path("02_intermediate", dataset, "rejected_interactions.parquet")
        tables["rejected_interactions"] = pl.read_parquet(rejected).sort("data_row")
        return (
            tables,
            {name: catalog.load(name) for name in REPORTS},
            {name: catalog.load(name) for name in SEQUENCES},
        )


def assert_same(found, expected):
    for name, frame in expected[0].items():
        assert found[0][name].schema == frame.schema, name
        assert found[0][name].equals(frame), name
    assert found[1] == expected[1]
    for name, arrays in expected[2].items():
        assert set(found[2][name]) == set(arrays)
        for array, values in arrays.items():
            assert found[2][name][array].dtype == values.dtype
            np.testing.assert_array_equal(found[2][name][array], values)


@pytest.mark.usefixtures("spark")
@pytest.mark.parametrize("dataset", LOGS)
def test_spark_gives_what_polars_gives(project, dataset):
    log = LOGS[dataset]
    if not log.is_file():
        pytest.skip(f"no {log.name} in {log.parent}")
    folder = project.path("01_raw", dataset)
    folder.mkdir(parents=True)
    (folder / "interactions.csv.gz").symlink_to(log)
    if (log.parent / "items.csv.gz").is_file():
        (folder / "items.csv.gz").symlink_to(log.parent / "items.csv.gz")
    project.run(pipelines=["data_processing"], dataset=dataset)
    expected = load(project, dataset)
    project.run(env="spark", pipelines=["data_processing"], dataset=dataset)
    parts = project.path("05_model_input", dataset, "encoded_interactions.parquet").iterdir()
    assert [file.suffix for file in parts] == [".parquet", ".parquet"]
    assert_same(load(project, dataset), expected)


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
def test_what_is_no_table_or_more_than_one_is_refused(tmp_path):
    assert make_raw_table(tmp_path, optional=True).load() is None
    with pytest.raises(DatasetError, match="No table 'interactions'"):
        make_raw_table(tmp_path).load()
    pl.DataFrame({"row": [1]}).write_parquet(tmp_path / "interactions.parquet")
    with pytest.raises(DatasetError, match="rename the column 'row'"):
        make_raw_table(tmp_path).load()
    (tmp_path / "interactions.csv").write_bytes(b"a,b\n1,2\n")
    with pytest.raises(DatasetError, match=r"found interactions.csv and interactions.parquet"):
        make_raw_table(tmp_path).load()


def test_without_spark_its_environment_says_what_to_install(project, monkeypatch):
    monkeypatch.setattr("sce_pipeline.spark.find_spec", lambda _: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'sce-pipeline\[spark\]'"):
        project.run(env="spark", pipelines=["data_processing"])
