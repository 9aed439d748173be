"""Which interactions train, which are targets of validation and test, and which are history only.

Every protocol labels each row with its part, or with the reason for which it is dropped.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

import narwhals.stable.v2 as nw

from sce_pipeline.interactions.engines import hold, spill
from sce_pipeline.interactions.errors import InteractionsError
from sce_pipeline.interactions.parts import CONTEXT, IN_TIME, PARTS, TEST, TRAIN, VALIDATION
from sce_pipeline.interactions.quantiles import nearest_quantile
from sce_pipeline.interactions.reports import Report, counts, tally
from sce_pipeline.interactions.split_checks import check_parts, check_size
from sce_pipeline.interactions.timestamps import EPOCH, MICROSECOND, at, since_epoch
from sce_pipeline.parameters import LeaveOneOutSplit, TemporalSplit

_ROWS_FOR_TEST, _ROWS_FOR_VALIDATION = 2, 3
"""A target needs a history of at least one row, and the validation target comes before the test."""

_UNSEEN_ITEM = "item unseen in training"
_BEFORE_CUT = "before the cut, of a user seen after it"
_NO_TARGET = "user without a target"


def split_interactions(
    interactions: nw.LazyFrame[Any], split: TemporalSplit | LeaveOneOutSplit
) -> tuple[nw.LazyFrame[Any], Report]:
    """Split a log into training, validation and test.

    Args:
        interactions: Columns user, item, timestamp and row.
        split: The protocol.

    Returns:
        The rows that belong to a part, with the column ``part`` (String), and the report.

    Raises:
        InteractionsError: The log is too small or a part is empty, in which case the message names
            the parameter to change; or a training row is not before all that it must precede.
    """
    check_size(interactions)
    if isinstance(split, LeaveOneOutSplit):
        cuts: dict[str, datetime] = {}
        labelled = _leave_one_out(interactions)
    elif split.train_users == "all":
        cuts = _find_cuts(interactions, split)
        labelled = _temporal_all(interactions, cuts[VALIDATION], cuts[TEST])
    else:
        cuts = _find_cuts(interactions, split)
        labelled = _temporal_disjoint(interactions, cuts[TEST])

    labelled = spill(labelled)
    tallies = _tally(labelled, cuts)
    check_parts(tallies, split, cuts)
    report = {
        "cuts": {
            part: {
                "time": cut.isoformat(),
                "epoch_seconds": (cut - EPOCH) / MICROSECOND / 1e6,
            }
            for part, cut in cuts.items()
        },
        "parts": {part: counts(tallies[part]) for part in PARTS},
        "dropped": {
            part: {"rows": tally["rows"], "users": tally["users"]}
            for part, tally in tallies.items()
            if part not in PARTS
        },
        "targets_without_history": sum(tally["without_history"] for tally in tallies.values()),
        "unseen_item_targets": {part: tallies[part]["unseen"] for part in (VALIDATION, TEST)},
    }
    kept = labelled.filter(nw.col("part").is_in(PARTS))
    return kept.select("user", "item", "timestamp", "row", "part").sort("row"), report


def _leave_one_out(log: nw.LazyFrame[Any]) -> nw.LazyFrame[Any]:
    """The last row of a user is the test target, the one before it the validation target."""
    n_rows, n_later = nw.col("n_rows"), nw.col("n_later")
    return _number(log, "user").with_columns(
        without_history=n_rows < _ROWS_FOR_TEST,
        part=nw.when((n_later == 0) & (n_rows >= _ROWS_FOR_TEST))
        .then(nw.lit(TEST))
        .when((n_later == 1) & (n_rows >= _ROWS_FOR_VALIDATION))
        .then(nw.lit(VALIDATION))
        .otherwise(nw.lit(TRAIN)),
    )


def _temporal_disjoint(log: nw.LazyFrame[Any], cut: datetime) -> nw.LazyFrame[Any]:
    """Users seen after the cut are held out whole, and start anew there (the SCE paper's split)."""
    is_after, is_known = nw.col("is_after"), nw.col("is_known")
    log = log.with_columns(is_after=nw.col("timestamp") >= at(cut))
    log = _mark(log, "user", is_after, "is_held_out").with_columns(is_train=~nw.col("is_held_out"))
    log = _mark(log, "item", nw.col("is_train"), "is_known")
    # Few rows come after the cut, so only they are numbered.
    later = log.filter(is_after & is_known).select("user", "timestamp", "row")
    numbered = hold(_number(later, "user").select("row", "n_rows", "n_later"))
    log = log.join(numbered, on="row", how="left")
    n_rows, n_later = nw.col("n_rows"), nw.col("n_later")
    return log.with_columns(
        without_history=(n_rows < _ROWS_FOR_TEST).fill_null(False),
        part=nw.when(nw.col("is_train"))
        .then(nw.lit(TRAIN))
        .when(~is_after)
        .then(nw.lit(_BEFORE_CUT))
        .when(~is_known)
        .then(nw.lit(_UNSEEN_ITEM))
        .when(n_rows < _ROWS_FOR_TEST)
        .then(nw.lit(_NO_TARGET))
        .when(n_later == 0)
        .then(nw.lit(TEST))
        .when((n_later == 1) & (n_rows >= _ROWS_FOR_VALIDATION))
        .then(nw.lit(VALIDATION))
        .otherwise(nw.lit(CONTEXT)),
    )


def _temporal_all(
    log: nw.LazyFrame[Any], validation_cut: datetime, test_cut: datetime
) -> nw.LazyFrame[Any]:
    """Everybody's past trains; the last row before and after the test cut are the targets."""
    is_train, is_known, is_test = nw.col("is_train"), nw.col("is_known"), nw.col("is_test")
    log = log.with_columns(
        is_train=nw.col("timestamp") < at(validation_cut),
        is_test=nw.col("timestamp") >= at(test_cut),
    )
    log = _mark(log, "item", is_train, "is_known")
    ends = _find_ends(log)
    is_target = nw.col("has_history") == 1
    has_target = ends.filter(is_target).select("user", has_target=nw.lit(True)).unique()
    log = log.join(ends.select("row", "has_history"), on="row", how="left")
    log = log.join(has_target, on="user", how="left")
    return log.with_columns(
        without_history=(nw.col("has_history") == 0).fill_null(False),
        part=nw.when(is_train)
        .then(nw.lit(TRAIN))
        .when(~is_known)
        .then(nw.lit(_UNSEEN_ITEM))
        .when(is_target & is_test)
        .then(nw.lit(TEST))
        .when(is_target)
        .then(nw.lit(VALIDATION))
        .when(~nw.col("has_target").is_null())
        .then(nw.lit(CONTEXT))
        .otherwise(nw.lit(_NO_TARGET)),
    )


def _find_ends(log: nw.LazyFrame[Any]) -> nw.LazyFrame[Any]:
    """Find the last row of each user before and after the test cut.

    Few rows come after the first cut, so only they are numbered.

    Args:
        log: Columns user, timestamp, row, is_train, is_test and is_known.

    Returns:
        Their row and user, and ``has_history``, 1 if something of the user comes before, else 0.
    """
    later = log.filter(~nw.col("is_train") & nw.col("is_known"))
    later = _number(later.select("user", "timestamp", "row", "is_test"), "user")
    later = later.with_columns(is_first=nw.col("n_later") == nw.col("n_rows") - 1)
    ends = hold(_number(later, "user", "is_test").filter(nw.col("n_later") == 0))
    trained = log.filter("is_train").select("user", is_trained=nw.lit(True)).unique()
    ends = ends.join(hold(trained), on="user", how="left")
    has_history = ~nw.col("is_first") | ~nw.col("is_trained").is_null()
    return hold(ends.select("row", "user", has_history=has_history.cast(nw.Int64)))


def _mark(log: nw.LazyFrame[Any], column: str, is_so: nw.Expr, name: str) -> nw.LazyFrame[Any]:
    """Say of each row whether something is so of any row with the same user or item.

    Those users or items are few beside the rows; a window would sort the rows.
    """
    marked = hold(log.filter(is_so).select(column).unique().with_columns(_is_so=nw.lit(True)))
    joined = log.join(marked, on=column, how="left")
    return joined.with_columns((~nw.col("_is_so").is_null()).alias(name)).drop("_is_so")


def _number(log: nw.LazyFrame[Any], *group: str) -> nw.LazyFrame[Any]:
    """Add to each row how many rows its group has, and how many of them are later than it."""
    log = log.drop("n_rows", "n_so_far", "n_later", strict=False)  # of another group
    sizes = log.group_by(*group).agg(n_rows=nw.len())
    sizes = hold(sizes.with_columns(nw.col("n_rows").cast(nw.Int64)))
    n_so_far = nw.col("row").cum_count().over(*group, order_by=IN_TIME)
    log = log.join(sizes, on=list(group)).with_columns(n_so_far=n_so_far)
    return log.with_columns(n_later=nw.col("n_rows") - nw.col("n_so_far").cast(nw.Int64))


def _find_cuts(log: nw.LazyFrame[Any], split: TemporalSplit) -> dict[str, datetime]:
    """The moments from which on rows are validation and test rows."""
    moment = nw.col("timestamp")
    # Every engine can tell the parts of a moment; Polars keeps the number itself.
    number = moment.dt.timestamp("us") if log.implementation.is_polars() else since_epoch(moment)
    numbers = log.select(number=number.cast(nw.Int64))
    test = EPOCH + nearest_quantile(numbers, split.quantile) * MICROSECOND
    validation = test
    if split.train_users == "all":
        validation = EPOCH + nearest_quantile(numbers, split.validation_cut) * MICROSECOND
    if split.train_users == "all" and validation == test:
        raise InteractionsError(
            f"The validation and the test cut fall on the same moment, {test.isoformat()}: choose "
            f"data_processing.split.validation_quantile = {split.validation_cut:g} and "
            f"data_processing.split.quantile = {split.quantile:g} farther apart"
        )
    return {VALIDATION: validation, TEST: test}


def _tally(labelled: nw.LazyFrame[Any], cuts: dict[str, datetime]) -> dict[str, dict[str, int]]:
    """Count every part and every reason for dropping, and the leaks."""
    is_train = nw.col("part") == TRAIN
    targets = labelled.filter(nw.col("part").is_in([VALIDATION, TEST]))
    first_targets = hold(
        targets.select("user", first_time="timestamp", first_row="row").unique(
            ["user"], keep="first", order_by=["first_time", "first_row"]
        )
    )
    checked = _mark(labelled, "item", is_train, "is_seen").join(first_targets, "user", how="left")
    time, first_time = nw.col("timestamp"), nw.col("first_time")
    is_late = (
        (time > first_time) | ((time == first_time) & (nw.col("row") > nw.col("first_row")))
    ).fill_null(False)
    if cuts:
        is_late = is_late | (time >= at(min(cuts.values())))
    sums = {
        "leaks": is_train & is_late,
        "unseen": ~nw.col("is_seen"),
        "without_history": nw.col("without_history"),
    }
    checked = checked.with_columns(**{name: is_so.cast(nw.Int64) for name, is_so in sums.items()})
    found = tally(checked, "part", **{name: nw.col(name).sum() for name in sums})
    empty = dict.fromkeys(("rows", "users", "items", *sums), 0)
    return dict.fromkeys(PARTS, empty) | found
