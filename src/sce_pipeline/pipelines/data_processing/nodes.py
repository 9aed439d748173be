"""Nodes of the data stage: frames of any engine in, frames of the same engine and reports out.

Items and users are Polars frames whatever the engine: all that follows looks things up in them.
"""

from __future__ import annotations

import logging
from datetime import datetime, timezone
from typing import Any

import narwhals.stable.v2 as nw
from narwhals.stable.v2.typing import IntoFrame

from sce_pipeline.interactions import cleaning, encoding, filters, sequences, splits, summary
from sce_pipeline.interactions.rejections import NOT_UTF_8, REMEDY
from sce_pipeline.interactions.reports import Report
from sce_pipeline.interactions.sequences import Arrays
from sce_pipeline.parameters import DataProcessingParameters
from sce_pipeline.provenance import stamp, stamp_items

logger = logging.getLogger(__name__)

WORTH_A_WARNING = 0.01
"""Share of a log's rows set aside from which on it is likelier a mistake than noise."""

N_REASONS = 3
"""The most frequent reasons that such a warning names."""


def clean_interactions(
    raw_interactions: IntoFrame, parameters: DataProcessingParameters
) -> tuple[IntoFrame, IntoFrame, Report]:
    """Bring the raw log to users, items, timestamps and rows; set aside what cannot be used."""
    interactions, rejected, report = cleaning.clean_interactions(
        _lazy(raw_interactions), parameters.columns
    )
    logger.info(
        "Kept %s of a raw log of %s%s; timestamps read as %s, from %s to %s",
        _size(report["kept"]),
        _size(report["raw"]),
        _losses(report),
        report["timestamp_unit"],
        report["first_timestamp"],
        report["last_timestamp"],
    )
    _warn_of_rejected(report)
    if report["last_timestamp"] < "1971":
        logger.warning(
            "All timestamps fall before 1971: is %s really in %s since 1970?",
            parameters.columns.timestamp,
            report["timestamp_unit"],
        )
    if report["last_timestamp"] > datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S"):
        logger.warning(
            "Timestamps reach into the future, to %s: is %s really in %s since 1970?",
            report["last_timestamp"],
            parameters.columns.timestamp,
            report["timestamp_unit"],
        )
    for doubt, rows in report["doubtful"].items():
        logger.warning("Kept %s rows with a doubtful value: %s", f"{rows:,}", doubt)
    return interactions.to_native(), rejected.to_native(), report


def filter_interactions(
    interactions: IntoFrame, parameters: DataProcessingParameters
) -> tuple[IntoFrame, Report]:
    """Drop items with few users, then users with few items."""
    filtered, report = filters.filter_interactions(_lazy(interactions), parameters.filters)
    logger.info(
        "Kept %s after filtering (passes: %d)%s",
        _size(report["kept"]),
        report["passes"],
        _losses(report),
    )
    return filtered.to_native(), report


def split_interactions(
    filtered_interactions: IntoFrame, parameters: DataProcessingParameters
) -> tuple[IntoFrame, Report]:
    """Tell which rows train, which are targets and which are history only."""
    split, report = splits.split_interactions(_lazy(filtered_interactions), parameters.split)
    parts, unseen = report["parts"], report["unseen_item_targets"]
    logger.info(
        "Train on %s; %s validation and %s test users, %s and %s of them with a target unseen in "
        "training%s",
        _size(parts["train"]),
        f"{parts['validation']['users']:,}",
        f"{parts['test']['users']:,}",
        f"{unseen['validation']:,}",
        f"{unseen['test']:,}",
        _losses(report),
    )
    return split.to_native(), report


def encode_interactions(
    split_interactions: IntoFrame,
    item_titles: IntoFrame | None,
    parameters: DataProcessingParameters,
) -> tuple[IntoFrame, IntoFrame, IntoFrame]:
    """Number users and items, and look up the items' titles."""
    encoded, items, users, report = encoding.encode_interactions(
        _lazy(split_interactions),
        None if item_titles is None else _lazy(item_titles),
        parameters.item_columns,
    )
    logger.info(
        "Catalogue of %s items, %s of them without a title",
        f"{report['items']:,}",
        f"{report['items_without_title']:,}",
    )
    if item_titles is not None and report["items_without_title"] == report["items"]:
        logger.warning(
            "The table of items has no title for any item: do its ids in %s look like the log's?",
            parameters.item_columns.item,
        )
    if report["repeated_item_rows"]:
        logger.warning(
            "The table of items repeats an id in %s rows: the first row of an id counts",
            f"{report['repeated_item_rows']:,}",
        )
    ids = (frame.collect(backend="polars").to_native() for frame in (items, users))
    return encoded.to_native(), *ids


def build_sequences(
    encoded_interactions: IntoFrame, items: IntoFrame, parameters: DataProcessingParameters
) -> tuple[Arrays, Arrays, Arrays, Arrays, Report]:
    """Lay out training windows, held-out histories and the items' popularity as flat arrays."""
    train, validation, test, popularity, report = sequences.build_sequences(
        _lazy(encoded_interactions), parameters.max_length, parameters.stride
    )
    logger.info(
        "%s training windows with %s targets; %s rows lie outside every window and %s users have "
        "none; %.1f%% of consecutive events share a timestamp",
        f"{report['windows']:,}",
        f"{report['targets']:,}",
        f"{report['rows_outside_windows']:,}",
        f"{report['users_without_window']:,}",
        100 * report["ties"]["share_of_pairs"],
    )
    ids = _lazy(items).sort("item").select("itemid").collect()["itemid"]
    made_with = stamp(parameters) | stamp_items(ids)
    return train | made_with, validation | made_with, test | made_with, popularity, report


def summarise_data(
    cleaning_report: Report,
    filter_report: Report,
    split_report: Report,
    sequence_report: Report,
    items: IntoFrame,
) -> Report:
    """Put the reports of all steps together."""
    return summary.summarise(
        cleaning_report, filter_report, split_report, sequence_report, _lazy(items)
    )


def _lazy(frame: IntoFrame) -> nw.LazyFrame[Any]:
    return nw.from_native(frame).lazy()


def _warn_of_rejected(report: Report) -> None:
    """Warn if cleaning set aside so many rows that the log may have been misread."""
    dropped = {why: loss["rows"] for why, loss in report["dropped"].items()}
    rejected = sum(dropped.values())
    share = rejected / report["raw"]["rows"]
    if share <= WORTH_A_WARNING:
        return
    most_frequent = sorted(dropped.items(), key=lambda reason: -reason[1])[:N_REASONS]
    logger.warning(
        "%.1f%% of the rows of the log cannot be used, mostly with %s: all %s of them are in "
        "rejected_interactions.parquet, in the data set's folder of data/02_intermediate",
        100 * share,
        ", ".join(f"{why} ({rows:,})" for why, rows in most_frequent),
        f"{rejected:,}",
    )
    if NOT_UTF_8 in dict(most_frequent):
        logger.warning("Where bytes are not UTF-8, %s", REMEDY)


def _size(counts: Report) -> str:
    return f"{counts['rows']:,} rows, {counts['users']:,} users, {counts['items']:,} items"


def _losses(report: Report) -> str:
    losses = [
        f"{loss['rows']:,} rows ({why})" for why, loss in report["dropped"].items() if loss["rows"]
    ]
    return f"; dropped {', '.join(losses)}" if losses else ""
