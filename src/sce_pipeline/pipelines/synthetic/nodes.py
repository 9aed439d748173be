"""Nodes that make a synthetic data set."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import polars as pl
from polars.io.plugins import register_io_source

from sce_pipeline.parameters import (
    DataProcessingParameters,
    EvaluationParameters,
    SyntheticParameters,
    TemporalSplit,
)
from sce_pipeline.synthetic.histories import draw_log
from sce_pipeline.synthetic.protocols import measure_best
from sce_pipeline.synthetic.world import World

logger = logging.getLogger(__name__)


def draw_interactions(
    synthetic: SyntheticParameters, data_processing: DataProcessingParameters
) -> pl.LazyFrame:
    """Draw the log, under the names of columns that the data stage asks for, when it is read."""
    columns = data_processing.columns
    schema = {columns.user: pl.Int32, columns.item: pl.Int32, columns.timestamp: pl.Int64}

    def read(
        names: list[str] | None, predicate: pl.Expr | None, n_rows: int | None, size: int | None
    ) -> Iterator[pl.DataFrame]:
        for chunk in draw_log(World(synthetic)):
            part = pl.DataFrame(dict(zip(schema, chunk, strict=True)))
            part = part if n_rows is None else part.head(n_rows)
            n_rows = None if n_rows is None else n_rows - len(part)
            part = part if predicate is None else part.filter(predicate)
            yield part if names is None else part.select(names)
            if n_rows == 0:
                break

    return register_io_source(read, schema=schema, is_pure=True)


def find_best_metrics(
    synthetic: SyntheticParameters,
    data_processing: DataProcessingParameters,
    evaluation: EvaluationParameters,
) -> dict[str, Any]:
    """Measure the ranking by the planted probabilities, under the protocol of the data set."""
    split, filters = data_processing.split, data_processing.filters
    if max(filters.min_users_per_item, filters.min_items_per_user) > 1:
        logger.warning(
            "The best metrics are of the whole log, but data_processing.filters drops rows of it: "
            "set min_users_per_item and min_items_per_user to 1 to compare a model with them"
        )
    cut = None
    if isinstance(split, TemporalSplit):
        if split.train_users == "disjoint":
            logger.warning(
                "The best metrics are given for leave_one_out alone: under temporal_disjoint a "
                "model does not see the whole history"
            )
        else:
            cut = split.quantile
    users = np.arange(min(synthetic.oracle_users, synthetic.n_users))
    settings = evaluation.model_dump(
        include={"cutoffs", "filter_seen", "n_bootstrap", "confidence", "seed"}
    )
    best = measure_best(World(synthetic), users, cut, **settings)
    for name, protocol in best.items():
        logger.info(
            "%s of %d users at best: %s",
            name,
            protocol["n_users"],
            ", ".join(
                f"NDCG@{cutoff} {protocol['history'][f'ndcg@{cutoff}']['value']:.4f} from the "
                f"history, {protocol['latent'][f'ndcg@{cutoff}']['value']:.4f} knowing the user"
                for cutoff in evaluation.cutoffs
            ),
        )
    return {
        "planted": synthetic.model_dump(mode="json"),
        "filters": filters.model_dump(mode="json"),
        "filter_seen": evaluation.filter_seen,
        "best": best,
    }
