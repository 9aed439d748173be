"""Nodes of the evaluation stage."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch

from sce_pipeline.evaluation.device import choose_device
from sce_pipeline.evaluation.metrics import measure
from sce_pipeline.evaluation.rankers import rank_with_model, rank_with_popularity
from sce_pipeline.models import load_model
from sce_pipeline.parameters import DataProcessingParameters, EvaluationParameters
from sce_pipeline.provenance import (
    ITEM_STAMP,
    check_stamp,
    read_item_stamp,
    read_stamp,
    stamp_weights,
)
from sce_pipeline.training_record import TrainingRecord

logger = logging.getLogger(__name__)


def rank_items(
    model_weights: dict[str, torch.Tensor],
    training_history: dict[str, Any],
    test_sequences: dict[str, np.ndarray],
    evaluation: EvaluationParameters,
    data_processing: DataProcessingParameters,
) -> dict[str, np.ndarray]:
    """Rank all items for every test user by the trained model.

    The model is that of the weights' training history, whatever this run would train. The rankings
    say which items they number and which weights ranked.

    Raises:
        ValueError: The sequences are not those that this run asks for or that the weights were
            trained on.
    """
    check_stamp(test_sequences, data_processing)
    record = TrainingRecord(training_history)
    record.check_held_out(read_stamp(test_sequences), "test_sequences")
    record.check_items(read_item_stamp(test_sequences), "test_sequences")
    model = load_model(record.model, model_weights, record.max_length).to(_device(evaluation))
    rankings = rank_with_model(
        model, test_sequences, max(evaluation.cutoffs), evaluation.filter_seen
    )
    return {
        **rankings,
        ITEM_STAMP: test_sequences[ITEM_STAMP],
        **stamp_weights(record.version),
    }


def rank_by_popularity(
    item_popularity: dict[str, np.ndarray],
    test_sequences: dict[str, np.ndarray],
    evaluation: EvaluationParameters,
) -> dict[str, np.ndarray]:
    """Rank all items for every test user by their popularity, the baseline to beat."""
    return rank_with_popularity(
        item_popularity,
        test_sequences,
        max(evaluation.cutoffs),
        evaluation.filter_seen,
        _device(evaluation),
    )


def measure_rankings(
    test_rankings: dict[str, np.ndarray],
    popularity_rankings: dict[str, np.ndarray],
    item_popularity: dict[str, np.ndarray],
    evaluation: EvaluationParameters,
) -> dict[str, Any]:
    """Measure the model's rankings and those by popularity."""
    settings = evaluation.model_dump(include={"cutoffs", "n_bootstrap", "confidence", "seed"})
    model = measure(test_rankings, item_popularity, **settings)
    popularity = measure(popularity_rankings, item_popularity, **settings)
    logger.info(
        "%d test users, %d of them with a target they had seen: %s",
        model["n_users"],
        model["n_repeated_targets"],
        ", ".join(
            f"NDCG@{cutoff} {model[f'ndcg@{cutoff}']['value']:.4f}"
            f" (popularity {popularity[f'ndcg@{cutoff}']['value']:.4f})"
            for cutoff in evaluation.cutoffs
        ),
    )
    return {"model": model, "popularity": popularity}


def _device(evaluation: EvaluationParameters) -> torch.device:
    return choose_device(evaluation.accelerator, "evaluation.accelerator")
