"""One account of the data, out of what every step reports."""

from __future__ import annotations

from typing import Any

import narwhals.stable.v2 as nw

from sce_pipeline.interactions.parts import TEST, TRAIN, VALIDATION
from sce_pipeline.interactions.reports import Report, collect_rows


def summarise(
    cleaning: Report,
    filtering: Report,
    splitting: Report,
    sequences: Report,
    items: nw.LazyFrame[Any],
) -> Report:
    """Put the steps' reports together.

    Returns:
        ``steps``: rows, users and items after each step, those of validation and test being the
        targets; ``history_lengths`` of the training users; ``catalogue``: items, and how many lack
        a title; and the reports as they are.
    """
    (catalogue,) = collect_rows(
        items.select(items=nw.len(), without_title=nw.col("title").null_count())
    )
    parts = {part: splitting["parts"][part] for part in (TRAIN, VALIDATION, TEST)}
    return {
        "steps": {"raw": cleaning["raw"], "clean": cleaning["kept"], "filtered": filtering["kept"]}
        | parts,
        "history_lengths": sequences["history_lengths"],
        "catalogue": catalogue,
        "cleaning": cleaning,
        "filters": filtering,
        "split": splitting,
        "sequences": sequences,
    }
