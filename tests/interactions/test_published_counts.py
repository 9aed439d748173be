from __future__ import annotations

from pathlib import Path

import narwhals.stable.v2 as nw
import polars as pl
import pytest

from sce_pipeline.interactions.cleaning import clean_interactions
from sce_pipeline.interactions.encoding import encode_interactions
from sce_pipeline.interactions.filters import filter_interactions
from sce_pipeline.interactions.sequences import build_sequences
from sce_pipeline.interactions.splits import split_interactions
from sce_pipeline.parameters import (
    Columns,
    Filters,
    ItemColumns,
    LeaveOneOutSplit,
    TemporalSplit,
)

ROOT = Path(__file__).resolve().parents[2]
MOVIELENS = ROOT / "data/01_raw/movielens_small/interactions.csv.gz"
SHARED = ROOT.parent / "shared/data"

PAPER = Filters(min_users_per_item=5, min_items_per_user=20, iterate=False)
EVERYTHING = Filters(min_users_per_item=1, min_items_per_user=1, iterate=False)


def process(file, filters, split):
    """The filtered counts, the split rows and the report of the split."""
    if file != MOVIELENS and not file.is_file():
        pytest.skip(f"no {file.name} in {file.parent}")
    log = nw.from_native(pl.scan_csv(file, infer_schema=False).with_row_index("row"))
    names = ("userId", "movieId") if file == MOVIELENS else ("userid", "itemid")
    columns = Columns(user=names[0], item=names[1], timestamp="timestamp")
    cleaned, _, report = clean_interactions(log, columns)
    assert report["dropped"] == {}
    assert report["timestamp_unit"] == "seconds"
    filtered, filter_report = filter_interactions(cleaned, filters)
    split_rows, split_report = split_interactions(filtered, split)
    return tuple(filter_report["kept"].values()), split_rows, split_report


def disjoint(quantile=0.95):
    return TemporalSplit(name="temporal", quantile=quantile, train_users="disjoint")


@pytest.mark.parametrize(
    ("file", "filters", "kept", "cut", "train", "after_cut", "users"),
    [
        (
            MOVIELENS,
            PAPER,
            (89_833, 658, 3_496),
            1459405413,
            (77_802, 618, 3_484),
            (4_493, 4_425),
            (39, 39),
        ),
        (
            SHARED / "amazon_beauty.csv.gz",
            PAPER,
            (42_269, 1_248, 8_942),
            1403136000,
            (22_233, 717, 7_083),
            (2_129, 744),
            (130, 66),
        ),
        (
            SHARED / "amazon_beauty.csv.gz",
            EVERYTHING,
            (198_502, 22_363, 12_101),
            1403049600,
            (152_324, 18_737, 12_000),
            (10_010, 8_636),
            (1_747, 1_116),
        ),
        (
            SHARED / "yelp.csv.gz",
            PAPER,
            (614_026, 12_702, 22_719),
            1545912490,
            (296_939, 6_809, 22_165),
            (30_702, 27_576),
            (4_031, 2_994),
        ),
        (
            SHARED / "gowalla_sample.csv.gz",
            PAPER,
            (88_966, 622, 5_164),
            1286648200,
            (22_473, 230, 4_260),
            (4_449, 3_689),
            (294, 253),
        ),
    ],
)
def test_the_papers_steps_give_their_counts(file, filters, kept, cut, train, after_cut, users):
    found, _, report = process(file, filters, disjoint())
    parts, dropped = report["parts"], report["dropped"]
    assert found == kept
    assert report["cuts"]["test"]["epoch_seconds"] == cut
    assert tuple(parts["train"].values()) == train
    known = sum(parts[part]["rows"] for part in ("context", "validation", "test"))
    known += dropped["user without a target"]["rows"]
    assert (known + dropped["item unseen in training"]["rows"], known) == after_cut
    assert (parts["test"]["users"], parts["validation"]["users"]) == users
    before_cut = dropped["before the cut, of a user seen after it"]["rows"]
    assert train[0] + after_cut[0] + before_cut == kept[0]


def test_an_earlier_cut_leaves_more_test_users():
    _, _, report = process(MOVIELENS, PAPER, disjoint(0.8))
    assert tuple(report["parts"]["train"].values()) == (64_005, 502, 3_237)
    assert report["parts"]["test"]["users"] == 155


def test_leave_one_out_and_the_ties_of_amazon_beauty():
    split = LeaveOneOutSplit(name="leave_one_out")
    _, rows, report = process(SHARED / "amazon_beauty.csv.gz", EVERYTHING, split)
    parts = report["parts"]
    assert parts["train"]["rows"] == 153_776
    assert parts["train"]["users"] == 22_363
    assert parts["validation"]["rows"] == parts["test"]["rows"] == 22_363
    encoded, items, _, _ = encode_interactions(rows, None, ItemColumns(item="", title=""))
    assert len(items.collect()) == 12_101
    *_, sequence_report = build_sequences(encoded, 200, None)
    assert sequence_report["ties"]["share_of_pairs"] == pytest.approx(0.44, abs=0.005)
    assert sequence_report["ties"]["share_of_users"] == pytest.approx(0.435, abs=0.0005)
