"""Which rows stay for their item's number of users and their user's number of items."""

from __future__ import annotations

from typing import Any, NamedTuple

import narwhals.stable.v2 as nw

from sce_pipeline.interactions.engines import hold, spill
from sce_pipeline.interactions.errors import InteractionsError
from sce_pipeline.interactions.reports import Report, collect_rows, counts
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
        done = _filter_once(pairs, filters)
        passes += 1
        rare += done.rare
        brief += done.brief
        # Items go first: a pass that drops no user leaves every item the users it was kept for.
        if not filters.iterate or done.brief == 0:
            break
        pairs = hold(done.pairs)  # or every pass would compute all before it again
    (kept,) = collect_rows(done.users.select(rows=nw.col("rows").sum(), users=nw.len()))
    (kept_items,) = collect_rows(done.items.select(items=nw.len()))
    if kept["users"] == 0:
        raise InteractionsError(_nothing_left(all_pairs, filters))
    # Of all rows of a user and an item that stay, none is dropped: two small tables say it all.
    stay = interactions.join(done.users, on="user", how="semi")
    stay = stay.join(done.items, on="item", how="semi")
    report = {
        "kept": counts(kept | kept_items),
        "dropped": {
            f"item with fewer than {filters.min_users_per_item} users": {"rows": rare},
            f"user with fewer than {filters.min_items_per_user} items": {"rows": brief},
        },
        "passes": passes,
    }
    return stay.sort("row"), report


class _Pass(NamedTuple):
    """What one pass leaves.

    Attributes:
        pairs: The distinct pairs that stay.
        users: Users that stay, and their rows.
        items: Items that stay.
        rare: Rows dropped for their item.
        brief: Rows dropped for their user.
    """

    pairs: nw.LazyFrame[Any]
    users: nw.LazyFrame[Any]
    items: nw.LazyFrame[Any]
    rare: int
    brief: int


def _filter_once(pairs: nw.LazyFrame[Any], filters: Filters) -> _Pass:
    """Drop the items with too few users, then the users with too few of the items that stay."""
    items, rare = _with_enough(pairs, "item", filters.min_users_per_item)
    if rare:
        pairs = pairs.join(items, on="item", how="semi")
    users, brief = _with_enough(pairs, "user", filters.min_items_per_user)
    if brief:
        pairs = pairs.join(users, on="user", how="semi")
        items = hold(pairs.select("item").unique())
    return _Pass(pairs, users, items.select("item"), rare, brief)


def _with_enough(
    pairs: nw.LazyFrame[Any], column: str, least: int
) -> tuple[nw.LazyFrame[Any], int]:
    """Return the users or items that are in enough distinct pairs, and the rows of the others."""
    sizes = hold(pairs.group_by(column).agg(pairs=nw.len(), rows=nw.col("rows").sum()))
    too_few = nw.col("pairs") < least
    (dropped,) = collect_rows(sizes.filter(too_few).select(rows=nw.col("rows").sum()))
    return sizes.filter(~too_few).select(column, "rows"), int(dropped["rows"] or 0)


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
