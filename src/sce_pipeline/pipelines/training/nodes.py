"""Nodes of the training pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from sce_pipeline.parameters import EvaluationParameters, TrainingParameters
from sce_pipeline.training.fit import fit


def train_model(
    train_sequences: dict[str, np.ndarray],
    validation_sequences: dict[str, np.ndarray],
    checkpoints: Path,
    training: TrainingParameters,
    evaluation: EvaluationParameters,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Train with the selected loss; returns the best weights and the training history."""
    return fit(train_sequences, validation_sequences, checkpoints, training, evaluation.filter_seen)
