"""Nodes of the pipeline of recommendations."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import narwhals.stable.v2 as nw
import numpy as np
import polars as pl
import torch

from sce_pipeline.evaluation.device import choose_device
from sce_pipeline.evaluation.ranking import NO_ITEM
from sce_pipeline.interactions import histories as whole
from sce_pipeline.interactions.columns import ROW, identifiers, require_columns
from sce_pipeline.interactions.errors import InteractionsError
from sce_pipeline.interactions.reports import Report
from sce_pipeline.models import load_model
from sce_pipeline.parameters import (
    DataProcessingParameters,
    ItemIds,
    RecommendationParameters,
)
from sce_pipeline.pipelines.recommendation.frames import Candidates, Histories, tabulate
from sce_pipeline.provenance import fingerprint, fingerprint_texts
from sce_pipeline.recommendation.catalogue import Catalogue
from sce_pipeline.recommendation.recommender import Recommender
from sce_pipeline.recommendation.request import name_request
from sce_pipeline.training_record import TrainingRecord

logger = logging.getLogger(__name__)

N_EXAMPLES = 10
"""Unknown ids of a list that are named."""

WORTH_A_WARNING = 0.1
"""Share of a file's users without a known item from which on its ids are likelier others."""

N_COMPARED = 3
"""Ids of the file and of the catalogue that such a warning puts side by side."""


@dataclass(frozen=True)
class SavedRecommender:
    """A recommender, and what tells its weights from others.

    Attributes:
        recommender: The model on its device.
        record: How it was trained.
        identity: Version and fingerprint of the weights, the model's parameters and its longest
            history.
    """

    recommender: Recommender
    record: TrainingRecord
    identity: dict[str, Any]


def load_recommender(
    model_weights: dict[str, torch.Tensor],
    training_history: dict[str, Any],
    recommendation: RecommendationParameters,
) -> SavedRecommender:
    """Put the trained model on the device that is to recommend.

    The model is that of the weights' training history, whatever this run would train.
    """
    record = TrainingRecord(training_history)
    model = load_model(record.model, model_weights, record.max_length)
    identity = {
        "weights_version": record.version,
        "weights": fingerprint({name: values.numpy() for name, values in model_weights.items()}),
        "model": record.model.model_dump(mode="json"),
        "max_length": record.max_length,
    }
    device = choose_device(recommendation.accelerator, "recommendation.accelerator")
    return SavedRecommender(Recommender(model.to(device)), record, identity)


def choose_candidates(
    items: pl.DataFrame,
    allowed_items: pl.LazyFrame | None,
    denied_items: pl.LazyFrame | None,
    recommendation: RecommendationParameters,
    data_processing: DataProcessingParameters,
) -> Candidates:
    """Tell from both lists, each from parameters and a file, what may be recommended."""
    column = data_processing.item_columns.item
    allow = _join_lists(recommendation.allow, allowed_items, "allowed_items", column)
    deny = _join_lists(recommendation.deny, denied_items, "denied_items", column)
    items = items.sort("item").select("itemid", "title")
    catalogue = Catalogue(items["itemid"].to_list(), items["title"].to_list())
    excluded, unknown_allowed, unknown_denied = catalogue.exclude(allow, deny or [])
    for name, unknown in (("allow", unknown_allowed), ("deny", unknown_denied)):
        if unknown:
            logger.warning(
                "%s ids of the items to %s are not in the catalogue, for example %s",
                f"{len(unknown):,}",
                name,
                ", ".join(unknown[:N_EXAMPLES]),
            )
    report = {
        "items": len(items),
        "candidates": int((~excluded).sum()),
        "unknown_allowed": _describe_unknown(unknown_allowed),
        "unknown_denied": _describe_unknown(unknown_denied),
    }
    return Candidates(items, excluded, report)


def collect_histories(
    interactions: pl.LazyFrame,
    new_histories: pl.LazyFrame | None,
    items: pl.DataFrame,
    recommendation: RecommendationParameters,
    data_processing: DataProcessingParameters,
) -> tuple[Histories, pl.DataFrame]:
    """Lay out the whole histories of all users that are asked for.

    Returns:
        The histories of those with a known item, and the ids (user) of the others, among them
        users of a file of whom no row can be used.

    Raises:
        InteractionsError: There is no file to read, or it cannot be used.
    """
    source, reading = nw.from_native(interactions), Report()
    without_rows: list[str] = []
    if recommendation.histories == "file":
        if new_histories is None:
            raise InteractionsError(
                "recommendation.histories is file, but there is no histories.csv, histories.csv.gz "
                "or histories.parquet in the data set's folder"
            )
        table = nw.from_native(new_histories)
        source, reading = whole.read_histories(table, data_processing.columns)
        if reading["dropped"]:  # spare a file without such rows the pass
            without_rows = whole.find_users_without_rows(table, source, data_processing.columns)
        logger.info("Histories are in the order of %s", reading["order"])
        for reason, loss in reading["dropped"].items():
            logger.warning(
                "Histories lack %s rows with %s, the first of them data row %s",
                f"{loss['rows']:,}",
                reason,
                f"{loss['first_data_row']:,}",
            )
    arrays, users, report = whole.collect_histories(source, nw.from_native(items).lazy())
    report = {
        "source": recommendation.histories,
        "reading": reading,
        **report,
        "users_without_usable_rows": len(without_rows),
    }
    _tell_unknown(report)
    if recommendation.histories == "file":
        _warn_of_strangers(report, items)
    offsets = arrays["offsets"]
    served = np.diff(offsets) > 0
    ids = pl.Series("user", users, dtype=pl.String)
    histories = Histories(ids.filter(served), arrays["items"], np.unique(offsets), report)
    unserved = ids.filter(~served).append(pl.Series(without_rows, dtype=pl.String))
    return histories, unserved.sort().to_frame()


def describe_request(
    recommender: SavedRecommender,
    candidates: Candidates,
    histories: Histories,
    recommendation: RecommendationParameters,
) -> tuple[str, dict[str, dict[str, Any]]]:
    """Name what the recommendations depend on.

    Returns:
        The name, and what it stands for, by the name.

    Raises:
        ValueError: The items are not those that the model was trained on.
    """
    n_items = recommender.recommender.n_items
    if n_items != len(candidates.items):
        raise ValueError(
            f"the model was trained on {n_items:,} items, but the catalogue has "
            f"{len(candidates.items):,}: load the weights that belong to the data, or train again"
        )
    items = fingerprint_texts(candidates.items["itemid"])
    recommender.record.check_items(items, "items")
    request = {
        **recommender.identity,
        "recommendation": recommendation.model_dump(mode="json", exclude={"accelerator"}),
        "items": items,
        "titles": fingerprint_texts(candidates.items["title"]),
        "users": fingerprint_texts(histories.users),
        "data": fingerprint(
            {
                "items": histories.items,
                "offsets": histories.offsets,
                "excluded": candidates.excluded,
            }
        ),
    }
    name = name_request(request)
    return name, {name: request}


def recommend_items(
    recommender: SavedRecommender,
    candidates: Candidates,
    histories: Histories,
    name: str,
    recommendation: RecommendationParameters,
) -> tuple[dict[str, Callable[[], pl.DataFrame]], Report]:
    """List the best items for all users.

    Returns:
        What computes each partition when it is to be saved, and the report: where partitions lie
        and what was unknown.
    """
    parts = histories.parts(recommendation.users_per_partition)
    partitions: dict[str, Callable[[], pl.DataFrame]] = {
        f"{name}/part_{number:06}": partial(
            _recommend_part,
            recommender.recommender,
            candidates,
            part,
            recommendation,
            f"{number + 1} of {len(parts)}",
        )
        for number, part in enumerate(parts)
    }
    logger.info(
        "%s items at most for each of %s users, from %s of %s items, to the folder %s",
        recommendation.k,
        f"{len(histories.users):,}",
        f"{candidates.report['candidates']:,}",
        f"{candidates.report['items']:,}",
        name,
    )
    report = {
        "folder": name,
        "partitions": len(parts),
        "users": len(histories.users),
        "histories": histories.report,
        "candidates": candidates.report,
    }
    return partitions, report


def _recommend_part(
    recommender: Recommender,
    candidates: Candidates,
    part: Histories,
    recommendation: RecommendationParameters,
    number: str,
) -> pl.DataFrame:
    started = time.perf_counter()
    top_items, top_scores = recommender.recommend(
        part.items,
        part.offsets,
        recommendation.k,
        recommendation.filter_seen,
        candidates.excluded,
    )
    n_short = int((top_items == NO_ITEM).any(axis=1).sum())
    logger.info(
        "Partition %s: %s users in %.1f s%s",
        number,
        f"{len(part.users):,}",
        time.perf_counter() - started,
        f"; for {n_short:,} fewer than {recommendation.k} items are left" if n_short else "",
    )
    return tabulate(part.users, candidates.items, top_items, top_scores)


def _join_lists(
    given: ItemIds | None, table: pl.LazyFrame | None, name: str, column: str
) -> list[str] | None:
    """Put the ids of parameters and of a file together; None where there is neither."""
    if given is None and table is None:
        return None
    ids = [str(item) for item in given or ()]
    if table is not None:
        frame = nw.from_native(table)
        require_columns(frame, {"data_processing.item_columns.item": column}, name)
        read = frame.select(item=identifiers(frame, column, name), row=nw.col(ROW)).collect()
        if missing := read["item"].null_count():
            logger.warning("%s has no id in %s rows", name, f"{missing:,}")
        ids += read["item"].drop_nulls().to_list()
        logger.info("Read %s ids from %s", f"{len(read) - missing:,}", name)
    return list(dict.fromkeys(ids))


def _describe_unknown(ids: list[str]) -> Report:
    return {"ids": len(ids), "examples": ids[:N_EXAMPLES]}


def _tell_unknown(report: Report) -> None:
    unknown, lost = report["unknown_items"], report["users_without_usable_rows"]
    logger.info(
        "Histories of %s users with %s rows; %s rows are of %s items that the catalogue does not "
        "have%s; %s users have no known item and get no recommendations%s",
        f"{report['users']:,}",
        f"{report['rows']:,}",
        f"{unknown['rows']:,}",
        f"{unknown['items']:,}",
        f" (most often {', '.join(unknown['examples'])})" if unknown["items"] else "",
        f"{report['users_without_known_items']:,}",
        f", nor do {lost:,} of whom no row can be used" if lost else "",
    )


def _warn_of_strangers(report: Report, items: pl.DataFrame) -> None:
    """Warn if so many users of a file have no known item that its ids may be written otherwise."""
    users, strangers = report["users"], report["users_without_known_items"]
    if strangers <= WORTH_A_WARNING * users:
        return
    logger.warning(
        "%s of %s users of the file of histories have no item that the model knows: ids of items "
        "in the file are %s, those of the catalogue %s",
        f"{strangers:,}",
        f"{users:,}",
        _quote(report["unknown_items"]["examples"]),
        _quote(items.sort("item")["itemid"].to_list()),
    )


def _quote(ids: list[str]) -> str:
    return ", ".join(repr(each) for each in ids[:N_COMPARED])
