"""Data that is prepared twice, with the engine of another environment and with Polars."""

from __future__ import annotations

import narwhals.stable.v2 as nw
import numpy as np
import polars as pl
import pytest
from kedro.framework.session import KedroSession

from helpers import ROOT
from sce_pipeline.datasets.raw_table import RawTableDataset
from sce_pipeline.interactions.cleaning import clean_interactions
from sce_pipeline.parameters import Columns

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


def prepare_twice(project, dataset, env):
    """Prepare a log without an environment, then with one, and compare all that comes out."""
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
    project.run(env=env, pipelines=["data_processing"], dataset=dataset)
    assert_same(load(project, dataset), expected)


def check_what_is_set_aside(folder, make_raw_table):
    """Check that records of a file in a folder are kept and set aside as they are on Polars."""
    (folder / "interactions.csv").write_bytes(
        b'user,item,time,note\n1,2,3,4,5\n1,2,1405686605,"x\ny"\n"1,2,3,\n1,caf\xe9,3,\n1,,3,\n'
    )
    columns = Columns(user="user", item="item", timestamp="time")

    def clean(table):
        kept, rejected, report = clean_interactions(nw.from_native(table).lazy(), columns)
        return kept.collect("polars").rows(), sorted(rejected.collect("polars").rows()), report

    kept, rejected, report = clean(make_raw_table(set_aside_malformed=True).load())
    on_polars = RawTableDataset(filepath=str(folder / "interactions"), set_aside_malformed=True)
    assert (kept, rejected, report) == clean(on_polars.load())
    assert [row[-1] for row in rejected] == ["1,2,3,4,5", '"1,2,3,', "1,caf\ufffd,3,", None]
    assert len(kept) == 1
