"""Wiring of the training pipeline."""

from __future__ import annotations

from typing import Any

from kedro.pipeline import Node, Pipeline

from sce_pipeline.pipelines.training.nodes import train_model


def create_pipeline(**kwargs: Any) -> Pipeline:
    """Sequences in, weights and training history out."""
    return Pipeline(
        [
            Node(
                train_model,
                inputs=[
                    "train_sequences",
                    "validation_sequences",
                    "checkpoints",
                    "params:training",
                    "params:evaluation",
                ],
                outputs=["model_weights", "training_history"],
                name="train_model",
            )
        ],
        namespace="training",
        prefix_datasets_with_namespace=False,
    )
