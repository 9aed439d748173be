"""Nodes of the training pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from sce_pipeline.parameters import (
    DataProcessingParameters,
    EvaluationParameters,
    TrainingParameters,
)
from sce_pipeline.provenance import check_stamp, read_item_stamp, read_origin
from sce_pipeline.training.fit import fit

Sequences = dict[str, np.ndarray]


def check_data(
    train_sequences: Sequences,
    validation_sequences: Sequences,
    data_processing: DataProcessingParameters,
) -> dict[str, Sequences]:
    """Make sure, before any training, that the sequences are those that this run asks for.

    Raises:
        ValueError: They are not, they do not number the same items or do not say which.
    """
    training_data = {"train": train_sequences, "validation": validation_sequences}
    for sequences in training_data.values():
        check_stamp(sequences, data_processing)
    if read_item_stamp(train_sequences) != read_item_stamp(validation_sequences):
        raise ValueError(
            "train_sequences and validation_sequences number different items; run the pipeline "
            "data_processing again"
        )
    return training_data


def train_model(
    training_data: dict[str, Sequences],
    checkpoints: Path,
    training: TrainingParameters,
    evaluation: EvaluationParameters,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Train with the selected loss; returns the best weights and the training history."""
    train, validation = training_data["train"], training_data["validation"]
    weights, history = fit(train, validation, checkpoints, training, evaluation.filter_seen)
    return weights, {**read_origin(train), **history}
