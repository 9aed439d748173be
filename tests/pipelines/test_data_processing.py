from __future__ import annotations

import gzip
import json
import logging

import numpy as np
import pandas as pd
import polars as pl
import pytest
from kedro.io import DataCatalog, MemoryDataset
from kedro.runner import SequentialRunner
from kedro_datasets.json import JSONDataset
from kedro_datasets.polars import EagerPolarsDataset, LazyPolarsDataset

from sce_pipeline.datasets.raw_table import RawTableDataset
from sce_pipeline.datasets.streamed_table import StreamedTableDataset
from sce_pipeline.interactions.errors import InteractionsError
from sce_pipeline.parameters import DataProcessingParameters
from sce_pipeline.pipelines.data_processing import create_pipeline

PARAMETERS = {
    "columns": {"user": "userid", "item": "itemid", "timestamp": "timestamp"},
    "item_columns": {"item": "itemid", "title": "title"},
    "filters": {"min_users_per_item": 1, "min_items_per_user": 1, "iterate": False},
    "split": {"name": "leave_one_out"},
    "max_length": 10,
    "stride": None,
}

OUTPUTS = {
    "rejected_interactions",
    "encoded_interactions",
    "items",
    "users",
    "train_sequences",
    "validation_sequences",
    "test_sequences",
    "item_popularity",
    "data_summary",
}

LOG = b"""userid,itemid,timestamp
7,a,2014-07-18
7,b,2014-07-19
7,c,2014-07-20
7,d,2014-07-21
,a,2014-07-22
30,b,2014-07-18
30,a,2014-07-18
30,c,2014-07-18
30,c,tomorrow
"""


def make_catalog(folder, parameters=PARAMETERS):
    """Raw files of a folder in, and on disk what is on disk in a real run."""
    parameters = DataProcessingParameters.model_validate(parameters)
    lazy = ("interactions", "filtered_interactions", "split_interactions", "encoded_interactions")
    reports = ("cleaning_report", "filter_report", "split_report", "sequence_report")
    return DataCatalog(
        {
            "raw_interactions": RawTableDataset(
                filepath=str(folder / "raw/interactions"), set_aside_malformed=True
            ),
            "item_titles": RawTableDataset(filepath=str(folder / "raw/items"), optional=True),
            "params:data_processing": MemoryDataset(parameters),
            "items": EagerPolarsDataset(filepath=folder / "items.parquet", file_format="parquet"),
        }
        | {
            name: LazyPolarsDataset(filepath=folder / f"{name}.parquet", file_format="parquet")
            for name in lazy
        }
        | {name: JSONDataset(filepath=folder / f"{name}.json") for name in reports}
        | {name: MemoryDataset() for name in OUTPUTS - {"encoded_interactions", "items"}}
        | {
            "rejected_interactions": StreamedTableDataset(
                filepath=str(folder / "rejected_interactions.parquet")
            )
        }
    )


def run(folder, parameters=PARAMETERS, **selection):
    catalog = make_catalog(folder, parameters)
    SequentialRunner().run(create_pipeline().filter(**selection), catalog)
    return catalog


def test_inputs_outputs_and_names_are_those_of_the_catalog():
    pipeline = create_pipeline()
    assert pipeline.inputs() == {"raw_interactions", "item_titles", "params:data_processing"}
    assert pipeline.outputs() == OUTPUTS - {"encoded_interactions", "items"}
    assert {node.namespace for node in pipeline.nodes} == {"data_processing"}
    assert [node.name.removeprefix("data_processing.") for node in pipeline.nodes] == [
        "clean_interactions",
        "filter_interactions",
        "split_interactions",
        "encode_interactions",
        "build_sequences",
        "summarise_data",
    ]
    assert all(len(node.inputs) <= 5 for node in pipeline.nodes)


def test_a_log_goes_from_file_to_sequences(tmp_path, caplog):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/interactions.csv.gz").write_bytes(gzip.compress(LOG))
    (tmp_path / "raw/items.csv").write_bytes(b"itemid,title\na,Apple\nb,Banana\na,Avocado\n")
    with caplog.at_level(logging.INFO, logger="sce_pipeline"):
        catalog = run(tmp_path)

    assert catalog.load("users").rows() == [(0, "7"), (1, "30")]
    assert catalog.load("items").rows() == [
        (0, "a", "Apple"),
        (1, "b", "Banana"),
        (2, "c", None),
        (3, "d", None),
    ]
    train = catalog.load("train_sequences")
    assert train["items"].tolist() == [0, 1, 1]
    assert train["window_stops"].tolist() == [2]
    test = catalog.load("test_sequences")
    assert test["items"].tolist() == [0, 1, 2, 1, 0]
    assert test["targets"].tolist() == [3, 2]
    validation = catalog.load("validation_sequences")
    assert validation["targets"].tolist() == [2, 0]
    assert catalog.load("item_popularity")["users"].tolist() == [1, 2, 0, 0]

    summary = catalog.load("data_summary")
    assert json.loads(json.dumps(summary)) == summary
    assert {step: size["rows"] for step, size in summary["steps"].items()} == {
        "raw": 9,
        "clean": 7,
        "filtered": 7,
        "train": 3,
        "validation": 2,
        "test": 2,
    }
    assert summary["catalogue"] == {"items": 4, "without_title": 2}

    messages = [record.getMessage() for record in caplog.records if "sce_pipe" in record.name]
    assert messages == [
        "Kept 7 rows, 2 users, 4 items of a raw log of 9 rows, 2 users, 4 items; dropped 1 rows "
        "(missing user), 1 rows (unparseable timestamp); timestamps read as dates, from "
        "2014-07-18T00:00:00 to 2014-07-21T00:00:00",
        "22.2% of the rows of the log cannot be used, mostly with missing user (1), unparseable "
        "timestamp (1): all 2 of them are in rejected_interactions.parquet, in the data set's "
        "folder of data/02_intermediate",
        "Kept 7 rows, 2 users, 4 items after filtering (passes: 1)",
        "Train on 3 rows, 2 users, 2 items; 2 validation and 2 test users, 1 and 2 of them with a "
        "target unseen in training",
        "Catalogue of 4 items, 2 of them without a title",
        "The table of items repeats an id in 1 rows: the first row of an id counts",
        "1 training windows with 1 targets; 1 rows lie outside every window and 1 users have none; "
        "40.0% of consecutive events share a timestamp",
    ]
    assert not any("[" in message for message in messages)


def test_rows_that_cannot_be_used_are_set_aside_until_the_log_has_none(tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/interactions.csv").write_bytes(LOG)
    rejected = run(tmp_path).load("rejected_interactions").collect()
    assert rejected.columns == ["data_row", "user", "item", "timestamp", "reason", "record"]
    assert rejected.rows() == [
        (5, None, "a", "2014-07-22", "missing user", None),
        (9, "30", "c", "tomorrow", "unparseable timestamp", None),
    ]
    (tmp_path / "raw/interactions.csv").write_bytes(
        LOG.replace(b"\n,a", b"\n8,a").replace(b"tomorrow", b"2014-07-23")
    )
    repaired = run(tmp_path).load("rejected_interactions").collect()
    assert repaired.schema == rejected.schema
    assert repaired.is_empty()


MALFORMED = LOG.replace(b"30,b", b'"7,e,2014-07-23\n7,e"f,2014-07-24\n30,b,2014-07-18\n30,b') + (
    b"30,d,2014-07-19,x\ncaf\xe9,d,2014-07-19\n8,a,b,c"
)


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz"])
@pytest.mark.parametrize("is_in_pandas", [False, True])
def test_malformed_records_are_set_aside_like_unusable_rows(tmp_path, suffix, is_in_pandas, caplog):
    (tmp_path / "raw").mkdir()
    content = gzip.compress(MALFORMED) if suffix == ".csv.gz" else MALFORMED
    (tmp_path / f"raw/interactions{suffix}").write_bytes(content)
    catalog = make_catalog(tmp_path)
    if is_in_pandas:
        catalog["raw_interactions"] = MemoryDataset(
            catalog.load("raw_interactions").collect().to_pandas()
        )
        for name in ("interactions", "rejected_interactions"):
            catalog[name] = MemoryDataset()
    pipeline = create_pipeline().only_nodes("data_processing.clean_interactions")
    with caplog.at_level(logging.WARNING, logger="sce_pipeline"):
        SequentialRunner().run(pipeline, catalog)

    rejected = catalog.load("rejected_interactions")
    rejected = pl.from_pandas(rejected) if is_in_pandas else rejected.collect()
    quote, nulls = "misplaced quote in record", (None, None, None)
    assert rejected.rows() == [
        (5, None, "a", "2014-07-22", "missing user", None),
        (6, *nulls, quote, '"7,e,2014-07-23'),
        (7, *nulls, quote, '7,e"f,2014-07-24'),
        (12, "30", "c", "tomorrow", "unparseable timestamp", None),
        (13, *nulls, "too many values in record", "30,d,2014-07-19,x"),
        (14, *nulls, "bytes that are not UTF-8 in record", "caf\ufffd,d,2014-07-19"),
        (15, *nulls, "too many values in record", "8,a,b,c"),
    ]
    report = catalog.load("cleaning_report")
    assert report["raw"] == {"rows": 15, "users": 2, "items": 4}
    assert report["kept"]["rows"] == 8
    assert {reason: loss["rows"] for reason, loss in report["dropped"].items()} == dict(
        rejected["reason"].value_counts().rows()
    )
    assert report["dropped"][quote] == {
        "rows": 2,
        "first_data_row": 6,
        "example": '"7,e,2014-07-23',
    }
    assert report["doubtful"] == {}
    (warning, _) = (r.getMessage() for r in caplog.records if "sce_pipe" in r.name)
    assert "mostly with misplaced quote in record (2), too many values in record (2)" in warning


def test_whoever_has_many_bytes_that_are_not_utf_8_is_told_to_convert_the_log(tmp_path, caplog):
    (tmp_path / "raw").mkdir()
    log = LOG.replace(b"7,a,", b"caf\xe9,a,").replace(b"7,b,", b"caf\xe9,b,")
    (tmp_path / "raw/interactions.csv").write_bytes(log)
    with caplog.at_level(logging.WARNING, logger="sce_pipeline"):
        run(tmp_path, node_names=["data_processing.clean_interactions"])
    said, hint = (record.getMessage() for record in caplog.records)
    assert "mostly with bytes that are not UTF-8 in record (2)" in said
    assert hint.startswith("Where bytes are not UTF-8, convert the file from the encoding it was")


def test_a_log_of_malformed_records_alone_is_refused_with_what_they_hold(tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/interactions.csv").write_bytes(b'userid,itemid,timestamp\n1,2,3,4\n"1,2,3\n')
    message = (
        r"None of the 2 rows of the log can be used: 1 with misplaced quote in record \(first in "
        r"data row 2: '\"1,2,3'\); 1 with too many values in record \(first in data row 1: "
        r"'1,2,3,4'\)\."
    )
    with pytest.raises(InteractionsError, match=message):
        run(tmp_path)


def test_a_future_and_doubtful_values_are_warned_of(tmp_path, caplog):
    (tmp_path / "raw").mkdir()
    usable = LOG.replace(b",a,2014-07-22\n", b"").replace(b"30,c,tomorrow\n", b"")
    (tmp_path / "raw/interactions.csv").write_bytes(
        usable + b"nan,a,2014-07-18\n 7,a,2014-07-18\n7,a,0\n7,a,2999-01-01\n"
    )
    with caplog.at_level(logging.WARNING, logger="sce_pipeline"):
        run(tmp_path)
    assert [record.getMessage() for record in caplog.records] == [
        "Timestamps reach into the future, to 2999-01-01T00:00:00: is timestamp really in seconds "
        "since 1970?",
        "Kept 1 rows with a doubtful value: space around an id",
        "Kept 1 rows with a doubtful value: id that says it is missing",
        "Kept 1 rows with a doubtful value: timestamp of exactly 0",
    ]


def test_a_log_of_which_more_than_a_hundredth_is_set_aside_is_warned_of(tmp_path, caplog):
    (tmp_path / "raw").mkdir()
    usable = [f"{row % 50},{row // 50},{1_400_000_000 + row}" for row in range(198)]
    unusable = [",x,5", "1,,5", "1,x,soon", "2,x,", "2,x,later", "3,x,then", "4,,5"]
    for n_unusable in (2, 7):
        rows = ["userid,itemid,timestamp", *usable, *unusable[:n_unusable]]
        (tmp_path / "raw/interactions.csv").write_text("\n".join(rows) + "\n")
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="sce_pipeline"):
            run(tmp_path)
        warned = [record.getMessage() for record in caplog.records]
        assert len(warned) == (n_unusable == 7)
    assert warned[0].startswith(
        "3.4% of the rows of the log cannot be used, mostly with unparseable timestamp (3), "
        "missing item (2), missing timestamp (1): all 7 of them are in "
    )


def test_a_log_without_titles_is_processed_too(tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/interactions.csv").write_bytes(LOG)
    assert run(tmp_path).load("items")["title"].null_count() == 4


def test_titles_that_belong_to_no_item_and_moments_of_1970_are_warned_of(tmp_path, caplog):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/interactions.csv").write_bytes(
        b"userid,itemid,timestamp\n"
        + b"".join(
            b"%d,%d,2017080%d\n" % (user, day, day) for user in (1, 2) for day in range(1, 5)
        )
    )
    (tmp_path / "raw/items.csv").write_bytes(b"itemid,title\n1.0,Alien\n2.0,Brazil\n")
    with caplog.at_level(logging.WARNING, logger="sce_pipeline"):
        run(tmp_path)
    assert [record.getMessage() for record in caplog.records] == [
        "All timestamps fall before 1971: is timestamp really in seconds since 1970?",
        "The table of items has no title for any item: do its ids in itemid look like the log's?",
    ]


def test_parquet_gives_what_csv_gives(tmp_path):
    log = pl.DataFrame(
        {"userid": [1, 1, 1, 2, 2, 2] * 3, "itemid": [4.0, 5.0, None, 6.0, 5.0, 4.0] * 3}
    ).with_columns(timestamp=pl.int_range(18) * 1000 + 1_400_000_000_000)
    for name in ("text/raw", "typed/raw"):
        (tmp_path / name).mkdir(parents=True)
    log.write_parquet(tmp_path / "typed/raw/interactions.parquet")
    log.cast({"itemid": pl.Int64}).write_csv(tmp_path / "text/raw/interactions.csv")
    text, typed = (run(tmp_path / name) for name in ("text", "typed"))
    assert_same_outputs(text, typed)
    assert text.load("data_summary")["cleaning"]["dropped"] == {
        "missing item": {"rows": 3, "first_data_row": 3}
    }


def test_a_later_node_runs_on_what_an_earlier_run_left_on_disk(tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/interactions.csv").write_bytes(LOG)
    whole = run(tmp_path)
    (tmp_path / "raw/interactions.csv").unlink()
    assert_same_outputs(whole, run(tmp_path, from_nodes=["data_processing.filter_interactions"]))


def test_frames_of_pandas_go_through_all_nodes(tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/interactions.csv").write_bytes(LOG)
    (tmp_path / "raw/items.csv").write_bytes(b"itemid,title\na,Apple\nb,Banana\na,Avocado\n")
    expected = run(tmp_path)
    catalog = make_catalog(tmp_path)
    for name in ("raw_interactions", "item_titles"):
        catalog[name] = MemoryDataset(catalog.load(name).collect().to_pandas())
    steps = ("interactions", "filtered_interactions", "split_interactions", "encoded_interactions")
    for name in (*steps, "rejected_interactions"):
        catalog[name] = MemoryDataset()
    SequentialRunner().run(create_pipeline(), catalog)
    assert isinstance(catalog.load("rejected_interactions"), pd.DataFrame)
    assert_same_outputs(expected, catalog)


def assert_same_outputs(left, right):
    for name in ("train_sequences", "validation_sequences", "test_sequences", "item_popularity"):
        arrays = right.load(name)
        for array, values in left.load(name).items():
            np.testing.assert_array_equal(arrays[array], values)
    assert left.load("data_summary") == right.load("data_summary")
    assert left.load("items").equals(right.load("items"))


PAPER = {
    "filters": {"min_users_per_item": 5, "min_items_per_user": 20, "iterate": False},
    "split": {"name": "temporal", "quantile": 0.8, "train_users": "disjoint"},
}


@pytest.mark.parametrize(("changes", "n_users"), [({}, 671), (PAPER, 502)])
def test_movielens(request, tmp_path, changes, n_users):
    folder = request.config.rootpath / "data/01_raw/movielens_small"
    (tmp_path / "raw").symlink_to(folder)
    names = {
        "columns": {"user": "userId", "item": "movieId", "timestamp": "timestamp"},
        "item_columns": {"item": "movieId", "title": "title"},
    }
    catalog = run(tmp_path, PARAMETERS | names | changes)
    assert catalog.load("data_summary")["catalogue"]["without_title"] == 0
    assert catalog.load("train_sequences")["users"].size == n_users
    assert catalog.load("items")["title"][0] == "Toy Story"
