"""Which rows stay for their item's number of users and their user's number of items."""

from __future__ import annotations

from typing import Any

import narwhals.stable.v2 as nw

from sce_pipeline.interactions.engines import hold, hold_all, spill
from sce_pipeline.interactions.errors import InteractionsError
from sce_pipeline.interactions.reports import Report, collect_rows, counts, tally
from sce_pipeline.parameters import Filters


def filter_interactions(
    interactions: nw.LazyFrame[Any], filters: Filters
) -> tuple[nw.LazyFrame[Any], Report]:
    """Drop items with few distinct users, then users with few distinct items.

    Repeated interactions are kept but count once. With ``filters.iterate`` both steps are repeated
    until neither drops anything (the k-core); the distinct pairs of a user and an item are then
    held in memory.

    Returns:
        The rows that stay, in the order of the file, and the report.

    Raises:
        InteractionsError: No row stays.
    """
    all_pairs = spill(interactions.group_by("user", "item").agg(rows=nw.len()))
    pairs, passes, rare, brief = all_pairs, 0, 0, 0
    while True:
        labelled = _label(pairs, filters)
        tallies = _tally(labelled)
        passes += 1
        rare += tallies["rare"]["rows"]
        brief += tallies["brief"]["rows"]
        kept = tallies["kept"]
        if kept["rows"] == 0:
            raise InteractionsError(_nothing_left(all_pairs, filters))
        pairs = labelled.filter(nw.col("fate") == "kept").select("user", "item", "rows")
        # Items go first: a pass that drops no user leaves every item the users it was kept for.
        if not filters.iterate or tallies["brief"]["rows"] == 0:
            break
        pairs = hold(pairs)  # or every pass would compute all before it again
    # Of all rows of a user and an item that stay, none is dropped: two small tables say it all.
    users, items = hold_all([pairs.select(column).unique() for column in ("user", "item")])
    stay = interactions.join(users, on="user", how="semi").join(items, on="item", how="semi")
    report = {
        "kept": counts(kept),
        "dropped": {
            f"item with fewer than {filters.min_users_per_item} users": {"rows": rare},
            f"user with fewer than {filters.min_items_per_user} items": {"rows": brief},
        },
        "passes": passes,
    }
    return stay.sort("row"), report


def _label(pairs: nw.LazyFrame[Any], filters: Filters) -> nw.LazyFrame[Any]:
    """Say of each distinct pair whether one pass keeps it, or which threshold is against it."""
    n_users = pairs.group_by("item").agg(n_users=nw.len())
    is_rare = nw.col("n_users") < filters.min_users_per_item
    pairs = pairs.join(n_users, on="item").with_columns(is_rare=is_rare)
    n_items = pairs.filter(~nw.col("is_rare")).group_by("user").agg(n_items=nw.len())
    fate = (
        nw.when(nw.col("is_rare"))
        .then(nw.lit("rare"))
        .when(nw.col("n_items") < filters.min_items_per_user)
        .then(nw.lit("brief"))
        .otherwise(nw.lit("kept"))
    )
    return pairs.join(n_items, on="user", how="left").with_columns(fate=fate)


def _tally(labelled: nw.LazyFrame[Any]) -> dict[str, Report]:
    empty = {"rows": 0, "users": 0, "items": 0}
    found = tally(labelled, "fate", rows=nw.col("rows").sum())
    return {fate: found.get(fate, empty) for fate in ("rare", "brief", "kept")}


def _nothing_left(pairs: nw.LazyFrame[Any], filters: Filters) -> str:
    def largest(group: str) -> int:
        sizes = pairs.group_by(group).agg(size=nw.len())
        return int(collect_rows(sizes.select(nw.col("size").max()))[0]["size"])

    return (
        f"The filters drop every row: no interaction has both an item with at least "
        f"data_processing.filters.min_users_per_item = {filters.min_users_per_item} distinct users "
        f"and a user with at least data_processing.filters.min_items_per_user = "
        f"{filters.min_items_per_user} such items"
        f"{', to the fixed point' if filters.iterate else ''}. In the log an item has at most "
        f"{largest('item'):,} users and a user at most {largest('user'):,} items; lower the filters"
    )
