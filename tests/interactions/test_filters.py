from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st
from interaction_logs import interactions, kept_rows, long_logs, n_dropped, small_logs

from sce_pipeline.interactions.errors import InteractionsError
from sce_pipeline.interactions.filters import filter_interactions
from sce_pipeline.parameters import Filters


def filtered(rows, users, items, iterate=False):
    filters = Filters(min_users_per_item=users, min_items_per_user=items, iterate=iterate)
    return filter_interactions(interactions(rows), filters)


def degrees(rows):
    """Distinct users of every item and distinct items of every user."""
    users, items = defaultdict(set), defaultdict(set)
    for user, item, _ in rows:
        users[item].add(user)
        items[user].add(item)
    return users, items


# Item z has one user. Without it c has one item, and without c item y has one user.
CHAIN = [("a", "x", 0), ("b", "x", 1), ("a", "w", 2), ("b", "w", 3), ("b", "y", 4), ("c", "y", 5)]
CHAIN += [("c", "z", 6), ("a", "x", 7)]


def test_one_pass_drops_items_and_then_users():
    frame, report = filtered(CHAIN, users=2, items=2)
    assert kept_rows(frame) == [0, 1, 2, 3, 4, 7]
    assert report == {
        "kept": {"rows": 6, "users": 2, "items": 3},
        "dropped": {
            "item with fewer than 2 users": {"rows": 1},
            "user with fewer than 2 items": {"rows": 1},
        },
        "passes": 1,
    }


def test_iterating_goes_on_to_the_fixed_point():
    frame, report = filtered(CHAIN, users=2, items=2, iterate=True)
    assert kept_rows(frame) == [0, 1, 2, 3, 7]
    assert report["kept"] == {"rows": 5, "users": 2, "items": 2}
    assert report["dropped"] == {
        "item with fewer than 2 users": {"rows": 2},
        "user with fewer than 2 items": {"rows": 1},
    }
    assert report["passes"] == 2


def test_repeats_are_kept_but_count_once():
    rows = [("a", "x", 0), ("a", "x", 0), ("a", "x", 1), ("b", "y", 2), ("c", "y", 3)]
    frame, _ = filtered(rows, users=2, items=1)
    assert kept_rows(frame) == [3, 4]
    with pytest.raises(InteractionsError):
        filtered(rows, users=1, items=2)


def test_nothing_left_names_the_thresholds_and_what_there_is():
    message = (
        r"min_users_per_item = 3 distinct .*min_items_per_user = 4 such .*"
        r"In the log an item has at most 2 users and a user at most 3 items"
    )
    with pytest.raises(InteractionsError, match=message):
        filtered(CHAIN, users=3, items=4)


@given(small_logs | long_logs, st.integers(1, 5), st.integers(1, 4), st.booleans())
def test_rows_are_conserved_and_thresholds_hold(rows, min_users, min_items, iterate):
    users, items = degrees(rows)
    survivors = [row for row in rows if len(users[row[1]]) >= min_users]
    while True:
        _, items = degrees(survivors)
        survivors = [row for row in survivors if len(items[row[0]]) >= min_items]
        users, items = degrees(survivors)
        if not iterate or all(len(of_item) >= min_users for of_item in users.values()):
            break
        survivors = [row for row in survivors if len(users[row[1]]) >= min_users]
    if not survivors:
        with pytest.raises(InteractionsError, match="The filters drop every row"):
            filtered(rows, min_users, min_items, iterate)
        return

    frame, report = filtered(rows, min_users, min_items, iterate)
    kept = kept_rows(frame)
    assert kept == [place for place, row in enumerate(rows) if row in survivors]
    assert report["kept"] == {"rows": len(kept), "users": len(items), "items": len(users)}
    assert len(kept) + n_dropped(report) == len(rows)
    assert min(len(of_user) for of_user in items.values()) >= min_items
    if iterate:
        assert min(len(of_item) for of_item in users.values()) >= min_users
        again, second = filter_interactions(
            frame,
            Filters(min_users_per_item=min_users, min_items_per_user=min_items, iterate=True),
        )
        assert kept_rows(again) == kept
        assert second["passes"] == 1
