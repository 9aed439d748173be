"""Histories and candidates as nodes pass them on, and lists of items as a table."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import polars as pl

from sce_pipeline.evaluation.ranking import NO_ITEM
from sce_pipeline.interactions.reports import Report


@dataclass(frozen=True)
class Histories:
    """Whole histories over the catalogue.

    Attributes:
        users: Original ids, String [n].
        items: Numbers of the items of all histories end to end, int32 [rows].
        offsets: Where each begins, and the end: int64 [n + 1]. None is empty.
        report: What was read, and what of it is unknown.
    """

    users: pl.Series
    items: np.ndarray
    offsets: np.ndarray
    report: Report

    def parts(self, n_users: int) -> list[Histories]:
        """Cut into histories of so many users each, and of what is left."""
        cuts = [*range(0, len(self.users), n_users), len(self.users)]
        return [self._part(start, stop) for start, stop in pairwise(cuts)]

    def _part(self, start: int, stop: int) -> Histories:
        offsets = self.offsets[start : stop + 1]
        items = self.items[offsets[0] : offsets[-1]]
        return Histories(self.users[start:stop], items, offsets - offsets[0], self.report)


@dataclass(frozen=True)
class Candidates:
    """The catalogue, and which of it may be recommended.

    Attributes:
        items: Columns itemid and title (String); row i is item i.
        excluded: Which items may not be, bool [n_items].
        report: How many may be, and which ids of the lists are unknown.
    """

    items: pl.DataFrame
    excluded: np.ndarray
    report: Report


def tabulate(
    users: pl.Series, items: pl.DataFrame, top_items: np.ndarray, top_scores: np.ndarray
) -> pl.DataFrame:
    """Write lists of items out with original ids, a row an item, user after user.

    Args:
        users: Original ids, String [n].
        items: Columns itemid and title (String); row i is item i.
        top_items: int32 [n, k], best first, then ``NO_ITEM``.
        top_scores: float32 [n, k].

    Returns:
        Columns user (String), rank (Int32, 1 the best), item (String), score (Float32) and title
        (String, null where unknown).
    """
    rows, places = np.nonzero(top_items != NO_ITEM)
    chosen = items[top_items[rows, places]]
    columns: dict[str, Any] = {
        "user": users[rows],
        "rank": pl.Series(places + 1, dtype=pl.Int32),
        "item": chosen["itemid"],
        "score": top_scores[rows, places],
        "title": chosen["title"],
    }
    return pl.DataFrame(columns)
