from __future__ import annotations

import narwhals.stable.v2 as nw
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from interaction_logs import interactions, long_logs, n_dropped, part_of_rows, small_logs

from sce_pipeline.interactions import splits
from sce_pipeline.interactions.errors import InteractionsError
from sce_pipeline.interactions.splits import split_interactions
from sce_pipeline.parameters import LeaveOneOutSplit, TemporalSplit

LEAVE_ONE_OUT = LeaveOneOutSplit(name="leave_one_out")


def temporal(train_users, quantile=0.5, validation_quantile=None):
    return TemporalSplit(
        name="temporal",
        quantile=quantile,
        train_users=train_users,
        validation_quantile=validation_quantile,
    )


def split_log(rows, split):
    """The part of each kept row, or None if the log cannot be split, and the report."""
    try:
        frame, report = split_interactions(interactions(rows), split)
    except InteractionsError:
        return None, {}
    return part_of_rows(frame), report


def test_disjoint_holds_out_users_seen_after_the_cut():
    rows = [
        ("a", "x", 0),
        ("a", "y", 1),
        ("b", "x", 2),
        ("b", "z", 3),
        ("a", "z", 4),
        ("c", "x", 5),  # before the cut, of a user seen after it
        ("c", "y", 10),  # the cut
        ("c", "new", 11),
        ("c", "x", 12),
        ("c", "z", 13),
        ("c", "y", 14),
        ("d", "x", 15),
        ("d", "y", 16),
        ("e", "z", 17),
        ("e", "new", 18),
    ]
    parts, report = split_log(rows, temporal("disjoint", quantile=6 / 14))
    train = dict.fromkeys(range(5), "train")
    assert parts == train | {
        6: "context",
        8: "context",
        9: "validation",
        10: "test",
        11: "context",
        12: "test",
    }
    assert report["cuts"] == {
        part: {"time": "1970-01-01T00:00:10", "epoch_seconds": 10.0}
        for part in ("validation", "test")
    }
    assert report["parts"] == {
        "train": {"rows": 5, "users": 2, "items": 3},
        "context": {"rows": 3, "users": 2, "items": 2},
        "validation": {"rows": 1, "users": 1, "items": 1},
        "test": {"rows": 2, "users": 2, "items": 1},
    }
    assert report["dropped"] == {
        "before the cut, of a user seen after it": {"rows": 1, "users": 1},
        "item unseen in training": {"rows": 2, "users": 2},
        "user without a target": {"rows": 1, "users": 1},
    }
    assert report["targets_without_history"] == 1
    assert report["unseen_item_targets"] == {"validation": 0, "test": 0}


def test_all_trains_on_everybodys_past():
    rows = [
        ("a", "x", 0),
        ("b", "y", 1),
        ("c", "z", 2),
        ("b", "x", 3),
        ("a", "y", 10),  # the validation cut
        ("a", "z", 11),
        ("b", "new", 12),
        ("d", "x", 13),  # first of its user and last before the test cut: only history
        ("e", "x", 14),  # first and only
        ("a", "x", 20),  # the test cut
        ("d", "y", 21),
        ("b", "z", 22),
        ("b", "y", 23),
        ("c", "new", 24),
        ("f", "x", 25),
        ("f", "y", 26),
    ]
    parts, report = split_log(rows, temporal("all", 9 / 15, validation_quantile=4 / 15))
    assert parts == {
        **dict.fromkeys(range(4), "train"),
        4: "context",
        5: "validation",
        7: "context",
        9: "test",
        10: "test",
        11: "context",
        12: "test",
        14: "context",
        15: "test",
    }
    assert report["cuts"]["validation"]["epoch_seconds"] == 10
    assert report["cuts"]["test"]["epoch_seconds"] == 20
    assert report["dropped"] == {
        "item unseen in training": {"rows": 2, "users": 2},
        "user without a target": {"rows": 1, "users": 1},
    }
    assert report["targets_without_history"] == 2


def test_the_validation_cut_is_derived_from_the_test_cut():
    rows = [(f"u{place % 3}", place % 2, place) for place in range(21)]
    _, report = split_log(rows, temporal("all", quantile=0.8))
    assert report["cuts"]["test"]["epoch_seconds"] == 16
    assert report["cuts"]["validation"]["epoch_seconds"] == 12


def test_leave_one_out_takes_the_last_two_rows_of_a_user():
    rows = [("a", "x", 3), ("a", "y", 1), ("a", "z", 2), ("b", "x", 0), ("b", "new", 9)]
    rows += [("c", "w", 5)]
    parts, report = split_log(rows, LEAVE_ONE_OUT)
    assert parts == {0: "test", 2: "validation", 1: "train", 3: "train", 4: "test", 5: "train"}
    assert report["cuts"] == {}
    assert report["dropped"] == {}
    assert report["unseen_item_targets"] == {"validation": 1, "test": 1}
    assert report["targets_without_history"] == 1


@pytest.mark.parametrize("split", [LEAVE_ONE_OUT, temporal("disjoint", 3 / 8)])
def test_equal_timestamps_keep_the_order_of_the_file(split):
    rows = [("a", "x", 0), ("a", "y", 0), ("a", "z", 0)]
    rows += [("b", item, 5) for item in ("z", "y", "x", "y", "z", "x")]
    parts, _ = split_log(rows, split)
    assert parts[7] == "validation"
    assert parts[8] == "test"


def test_rows_come_in_the_order_of_the_file_whatever_order_they_came_in():
    rows = [(user, item, 9 - place) for user in "ab" for place, item in enumerate("xyzx")]
    backwards = interactions(rows).sort("row", descending=True)
    frame, _ = split_interactions(backwards, LEAVE_ONE_OUT)
    assert frame.collect()["row"].to_list() == list(range(8))
    assert part_of_rows(frame) == split_log(rows, LEAVE_ONE_OUT)[0]


def test_a_cut_falls_on_the_nearest_row_with_halves_to_even():
    # 30 * 0.95 = 28.5 rounds to 28 here as in pandas; Polars alone would take 29.
    rows = [(f"u{place}", place % 2, place) for place in range(10)]
    rows += [(f"v{place % 4}", place % 2, place) for place in range(10, 31)]
    frame = pd.Series([second for _, _, second in rows])
    assert frame.quantile(0.95, interpolation="nearest") == 28
    _, report = split_log(
        [*rows[:-3], *(("w", 0, 28), ("w", 1, 29), ("w", 0, 30))], (temporal("disjoint", 0.95))
    )
    assert report["cuts"]["test"]["epoch_seconds"] == 28


def is_too_small(rows, parts):
    """Whether a log has one user or one item, or leaves a part empty."""
    users, items, _ = map(set, zip(*rows, strict=True))
    return min(len(users), len(items)) < 2 or not {"train", "validation", "test"} <= set(
        parts.values()
    )


def paper_split(rows, quantile):
    """The split of the SCE paper in pandas: the part of each row that is kept."""
    log = pd.DataFrame(rows, columns=["user", "item", "time"])
    log["row"] = range(len(log))
    cut = log["time"].quantile(quantile, interpolation="nearest")
    test_users = log.loc[log["time"] >= cut, "user"].unique()
    train = log[~log["user"].isin(test_users)]
    test = log[(log["time"] >= cut) & log["item"].isin(train["item"])]
    test = test.sort_values(["user", "time", "row"])
    test = test[test.groupby("user")["row"].transform("size") >= 2]
    last = test.groupby("user").tail(1)
    rest = test.drop(last.index)
    before = rest[rest.groupby("user")["row"].transform("size") >= 2].groupby("user").tail(1)
    context = rest.drop(before.index)
    parts = dict.fromkeys(train["row"], "train") | dict.fromkeys(last["row"], "test")
    return (
        parts
        | dict.fromkeys(before["row"], "validation")
        | dict.fromkeys(context["row"], "context")
    )


@settings(max_examples=100)
@given(small_logs | long_logs, st.floats(0.05, 0.95))
def test_disjoint_is_the_papers_split(rows, quantile):
    expected = paper_split(rows, quantile)
    parts, report = split_log(rows, temporal("disjoint", quantile))
    if parts is None:
        assert is_too_small(rows, expected)
        return
    assert parts == expected
    assert len(parts) + n_dropped(report) == len(rows)


PROTOCOLS = st.one_of(
    st.just(LEAVE_ONE_OUT),
    st.builds(temporal, st.just("disjoint"), st.floats(0.1, 0.9)),
    st.builds(lambda quantile: temporal("all", quantile), st.floats(0.55, 0.95)),
)


@settings(max_examples=100)
@given(long_logs, PROTOCOLS)
def test_no_future_leaks_into_training(rows, split):
    parts, report = split_log(rows, split)
    if parts is None:
        return
    when = {place: (second, place) for place, (_, _, second) in enumerate(rows)}
    is_temporal = isinstance(split, TemporalSplit)
    known = {rows[place][1] for place, part in parts.items() if part == "train"}
    assert len(parts) + n_dropped(report) == len(rows)
    assert {part: size["rows"] for part, size in report["parts"].items()} == {
        part: list(parts.values()).count(part) for part in report["parts"]
    }
    targets = [place for place, part in parts.items() if part in ("validation", "test")]
    assert len({(rows[place][0], parts[place]) for place in targets}) == len(targets)
    for target in targets:
        own = [place for place in parts if rows[place][0] == rows[target][0]]
        assert any(when[place] < when[target] for place in own)
        assert all(when[place] < when[target] for place in own if parts[place] == "train")
        if is_temporal:
            assert rows[target][1] in known
    if is_temporal:
        cuts = {part: cut["epoch_seconds"] for part, cut in report["cuts"].items()}
        for place, part in parts.items():
            second = rows[place][2]
            assert (second < cuts["validation"]) == (part == "train")
            assert part != "test" or second >= cuts["test"]
            assert (
                part != "validation" or second < cuts["test"] or cuts["validation"] == cuts["test"]
            )


@settings(max_examples=100)
@given(small_logs | long_logs, st.floats(0.55, 0.95))
def test_all_keeps_what_can_be_history_or_target(rows, quantile):
    seconds = pd.Series([second for _, _, second in rows])
    cuts = seconds.quantile([2 * quantile - 1, quantile], interpolation="nearest").tolist()
    known = {item for _, item, second in rows if second < cuts[0]}
    expected = {place: "train" for place, row in enumerate(rows) if row[2] < cuts[0]}
    for user in {user for user, _, _ in rows}:
        own = [place for place, row in enumerate(rows) if row[0] == user and row[1] in known]
        own.sort(key=lambda place: (rows[place][2], place))
        targets = {}
        for part, start, stop in (("validation", *cuts), ("test", cuts[1], 99)):
            period = [place for place in own if start <= rows[place][2] < stop]
            if period and period[-1] != own[0]:
                targets[period[-1]] = part
        if targets:
            later = [place for place in own if rows[place][2] >= cuts[0]]
            expected |= dict.fromkeys(later, "context") | targets

    parts, _ = split_log(rows, temporal("all", quantile))
    if parts is None:
        assert cuts[0] == cuts[1] or is_too_small(rows, expected)
    else:
        assert parts == expected


@pytest.mark.parametrize("rows", [[("a", "x", 0), ("a", "y", 1)], [("a", "x", 0), ("b", "x", 1)]])
def test_one_user_or_one_item_is_nothing_to_learn_from(rows):
    with pytest.raises(InteractionsError, match="at least two of each"):
        split_interactions(interactions(rows), LEAVE_ONE_OUT)


TWO_USERS = [("a", "x", 0), ("a", "y", 1), ("b", "x", 2), ("b", "y", 3)]


@pytest.mark.parametrize(
    ("rows", "split", "message"),
    [
        (
            [(user, item, 0) for user in "ab" for item in "xyz"],
            temporal("disjoint", 0.5),
            r"no train rows .* raise data_processing.split.quantile = 0.5 or choose the split temp",
        ),
        (
            [*TWO_USERS, ("c", "x", 9)],
            temporal("disjoint", 0.9),
            r"no validation target .* three rows .* lower data_processing.split.quantile = 0.9",
        ),
        (
            [*TWO_USERS, ("c", "new", 9), ("c", "newer", 10)],
            temporal("disjoint", 0.8),
            r"no validation target .* lower data_processing.split.quantile = 0.8",
        ),
        (
            [(user, item, 0) for user in "ab" for item in "xyz"],
            temporal("all", 0.8),
            r"same moment, 1970-01-01T00:00:00.*validation_quantile = 0.6 .*quantile = 0.8",
        ),
        (
            [*((user, item, 0) for user in "ab" for item in "xyz"), ("a", "x", 1), ("b", "x", 2)],
            temporal("all", 0.9, validation_quantile=0.1),
            r"no train rows .* raise data_processing.split.validation_quantile = 0.1",
        ),
        (
            [*TWO_USERS, ("a", "new", 4), ("a", "x", 5)],
            temporal("all", 0.99, validation_quantile=0.8),
            r"no validation target .* lower data_processing.split.validation_quantile = 0.8",
        ),
        (
            [*TWO_USERS, ("a", "x", 4), ("a", "new", 5)],
            temporal("all", 0.99, validation_quantile=0.8),
            r"no test target .* lower data_processing.split.quantile = 0.99",
        ),
        (TWO_USERS, LEAVE_ONE_OUT, r"no validation target: the split leave_one_out needs"),
    ],
)
def test_an_empty_part_names_the_parameter_to_change(rows, split, message):
    with pytest.raises(InteractionsError, match=message):
        split_interactions(interactions(rows), split)


@pytest.mark.parametrize(
    ("split", "protocol"),
    [
        (LEAVE_ONE_OUT, "_leave_one_out"),
        (temporal("disjoint", 6 / 11), "_temporal_disjoint"),
        (temporal("all", 9 / 11, validation_quantile=6 / 11), "_temporal_all"),
    ],
)
def test_a_protocol_that_leaks_is_caught(split, protocol, monkeypatch):
    rows = [(user, item, ord(user)) for user in "abcd" for item in "xyz"]
    parts, _ = split_log(rows, split)
    assert parts[8] in ("validation", "test")

    right = getattr(splits, protocol)

    def leaky(*arguments):
        is_target = nw.col("row") == 8
        part = nw.when(is_target).then(nw.lit("train")).otherwise(nw.col("part"))
        return right(*arguments).with_columns(part=part)

    monkeypatch.setattr(splits, protocol, leaky)
    with pytest.raises(InteractionsError, match="1 training rows are not before"):
        split_interactions(interactions(rows), split)
