"""Nodes of the baselines."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from scipy import sparse

from sce_pipeline.evaluation.baselines import (
    fit_item_knn,
    fit_pure_svd,
    interaction_matrix,
    rank_with_item_knn,
    rank_with_pure_svd,
)
from sce_pipeline.evaluation.device import choose_device
from sce_pipeline.evaluation.metrics import measure
from sce_pipeline.parameters import (
    BaselineParameters,
    DataProcessingParameters,
    EvaluationParameters,
)
from sce_pipeline.provenance import check_stamp, read_origin

logger = logging.getLogger(__name__)

Arrays = dict[str, np.ndarray]


def collect_interactions(
    train_sequences: Arrays,
    test_sequences: Arrays,
    data_processing: DataProcessingParameters,
    baselines: BaselineParameters,
) -> tuple[sparse.csr_array, dict[str, Any]]:
    """Say which user has which items in training, once the sequences are those asked for.

    Returns:
        The matrix of users × items, and the record of what the baselines are fitted on and how.
    """
    for sequences in (train_sequences, test_sequences):
        check_stamp(sequences, data_processing)
    record = {
        **read_origin(train_sequences),
        "parameters": baselines.model_dump(mode="json"),
    }
    return interaction_matrix(train_sequences), record


def rank_by_item_knn(
    interactions: sparse.csr_array,
    test_sequences: Arrays,
    baselines: BaselineParameters,
    evaluation: EvaluationParameters,
) -> Arrays:
    """Rank all items for every test user by their similarity to the history."""
    similarities = fit_item_knn(interactions, **baselines.item_knn.model_dump())
    return rank_with_item_knn(
        similarities, test_sequences, max(evaluation.cutoffs), evaluation.filter_seen
    )


def rank_by_pure_svd(
    interactions: sparse.csr_array,
    test_sequences: Arrays,
    baselines: BaselineParameters,
    evaluation: EvaluationParameters,
) -> Arrays:
    """Rank all items for every test user by singular vectors of the interactions."""
    return rank_with_pure_svd(
        fit_pure_svd(interactions, baselines.pure_svd.n_factors, baselines.seed),
        test_sequences,
        max(evaluation.cutoffs),
        evaluation.filter_seen,
        choose_device(evaluation.accelerator, "evaluation.accelerator"),
    )


def measure_baselines(
    item_knn_rankings: Arrays,
    pure_svd_rankings: Arrays,
    item_popularity: Arrays,
    evaluation: EvaluationParameters,
) -> dict[str, Any]:
    """Measure the baselines as the models are measured."""
    settings = evaluation.model_dump(include={"cutoffs", "n_bootstrap", "confidence", "seed"})
    rankings = {"item_knn": item_knn_rankings, "pure_svd": pure_svd_rankings}
    metrics = {name: measure(each, item_popularity, **settings) for name, each in rankings.items()}
    for name, measured in metrics.items():
        logger.info(
            "%s: %s",
            name,
            ", ".join(f"NDCG@{k} {measured[f'ndcg@{k}']['value']:.4f}" for k in evaluation.cutoffs),
        )
    return metrics
