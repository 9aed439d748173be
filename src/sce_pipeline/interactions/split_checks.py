"""What must hold of a split log, with errors that name the parameter to change."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import narwhals.stable.v2 as nw

from sce_pipeline.interactions.errors import InteractionsError
from sce_pipeline.interactions.parts import TEST, TRAIN, VALIDATION
from sce_pipeline.interactions.reports import collect_rows
from sce_pipeline.parameters import LeaveOneOutSplit, TemporalSplit


def check_size(log: nw.LazyFrame[Any]) -> None:
    """Raise unless there are two users and two items.

    Raises:
        InteractionsError: There are fewer.
    """
    (size,) = collect_rows(
        log.select(users=nw.col("user").n_unique(), items=nw.col("item").n_unique())
    )
    if min(size.values()) < 2:  # noqa: PLR2004
        raise InteractionsError(
            f"A log of {size['users']} user(s) and {size['items']} item(s) is nothing to learn "
            f"from: at least two of each must be left; data_processing.filters decides how many are"
        )


def check_parts(
    tallies: dict[str, dict[str, int]],
    split: TemporalSplit | LeaveOneOutSplit,
    cuts: dict[str, datetime],
) -> None:
    """Raise if a part is empty or if a training row comes too late.

    Args:
        tallies: For each part its ``rows``, and its ``leaks``: those not before the first cut, or
            not before all of their user's targets.
        split: The protocol.
        cuts: Its moments, by part.

    Raises:
        InteractionsError: Either is the case; an empty part names the parameter to change.
    """
    if leaks := tallies[TRAIN]["leaks"]:
        raise InteractionsError(
            f"{leaks:,} training rows are not before the cut and before their user's own targets"
        )
    for part in (TRAIN, VALIDATION, TEST):
        if tallies[part]["rows"] == 0:
            moments = ", ".join(f"{name} from {cut.isoformat()} on" for name, cut in cuts.items())
            raise InteractionsError(
                f"The split leaves no {part} {'rows' if part == TRAIN else 'target'}"
                f"{f' ({moments})' if cuts else ''}: {_cure(part, split)}"
            )


def _cure(part: str, split: TemporalSplit | LeaveOneOutSplit) -> str:
    """What to change when a part is empty."""
    if isinstance(split, LeaveOneOutSplit):
        return (
            "the split leave_one_out needs a user with at least two rows for a test target and "
            "three for a validation target; choose another split, or a log with longer histories"
        )
    is_disjoint = split.train_users == "disjoint"
    if part == TRAIN and is_disjoint:
        return (
            f"every user has a row after the cut; raise data_processing.split.quantile = "
            f"{split.quantile:g} or choose the split temporal, where everybody's past trains"
        )
    if part == TRAIN:
        return f"raise data_processing.split.validation_quantile = {split.validation_cut:g}"
    if is_disjoint:
        return (
            f"no user has {'two' if part == TEST else 'three'} rows after the cut of items seen in "
            f"training; lower data_processing.split.quantile = {split.quantile:g}"
        )
    name, cut = (
        ("quantile", split.quantile)
        if part == TEST
        else ("validation_quantile", split.validation_cut)
    )
    return (
        f"no user has a history and, after the cut, an item seen in training; lower "
        f"data_processing.split.{name} = {cut:g}"
    )
