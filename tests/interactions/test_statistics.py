from __future__ import annotations

import json
from itertools import pairwise

import narwhals.stable.v2 as nw
import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sce_pipeline.interactions.statistics import (
    count_repeats,
    count_ties,
    describe_lengths,
    describe_repeats,
    describe_ties,
)
from sce_pipeline.interactions.summary import summarise


def test_repeats_count_rows_after_the_first_of_a_pair():
    users = np.array([0, 0, 0, 0, 1, 1], dtype=np.int32)
    items = np.array([5, 5, 2, 5, 5, 2], dtype=np.int32)
    assert describe_repeats(count_repeats(users, items)) == {"rows": 2, "share_of_rows": 2 / 6}


def test_repeats_do_not_overflow():
    users = np.array([2**31 - 2, 2**31 - 2, 0], dtype=np.int32)
    items = np.array([2**31 - 2, 2**31 - 2, 0], dtype=np.int32)
    assert count_repeats(users, items)["repeated"] == 1


def test_ties_are_counted_within_a_user_and_at_the_end_of_its_history():
    users = np.array([0, 0, 0, 1, 1, 2, 3, 3])
    times = np.array([1, 1, 2, 2, 2, 2, 4, 5])
    assert describe_ties(count_ties(users, times)) == {
        "share_of_pairs": 2 / 4,
        "share_of_users": 1 / 4,
    }


def test_single_events_have_no_ties():
    assert describe_ties(count_ties(np.array([0, 1]), np.array([3, 3]))) == {
        "share_of_pairs": 0.0,
        "share_of_users": 0.0,
    }


@given(st.lists(st.integers(1, 400), min_size=1))
def test_the_histogram_holds_every_user_once_in_equal_bins(lengths):
    described = describe_lengths(np.array(lengths))
    edges, counts = described["bin_edges"], described["counts"]
    assert len(edges) == len(counts) + 1 <= 51
    assert len(set(np.diff(edges))) == 1
    assert edges[0] == min(lengths) == described["min"]
    assert edges[-1] > max(lengths) == described["max"]
    assert counts == [
        sum(start <= length < stop for length in lengths) for start, stop in pairwise(edges)
    ]
    assert described["median"] == pytest.approx(np.median(lengths))


def test_the_summary_puts_the_steps_together():
    def size(rows):
        return {"rows": rows, "users": 2, "items": 3}

    cleaning = {"raw": size(9), "kept": size(8), "dropped": {"missing user": {"rows": 1}}}
    filtering = {"kept": size(7), "dropped": {}, "passes": 1}
    parts = {"train": size(4), "context": size(1), "validation": size(1), "test": size(1)}
    sequences = {"windows": 2, "history_lengths": {"bin_edges": [1, 3], "counts": [2]}}
    items = nw.from_native(pl.LazyFrame({"item": [0, 1, 2], "title": ["A", None, None]}))
    summary = summarise(cleaning, filtering, {"parts": parts}, sequences, items)
    assert {step: size["rows"] for step, size in summary["steps"].items()} == {
        "raw": 9,
        "clean": 8,
        "filtered": 7,
        "train": 4,
        "validation": 1,
        "test": 1,
    }
    assert summary["catalogue"] == {"items": 3, "without_title": 2}
    assert summary["history_lengths"] == {"bin_edges": [1, 3], "counts": [2]}
    assert summary["cleaning"] == cleaning
    assert json.loads(json.dumps(summary)) == summary
