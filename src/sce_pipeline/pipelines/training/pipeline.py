"""Wiring of the training pipeline."""

from __future__ import annotations

from kedro.pipeline import Node, Pipeline

from sce_pipeline.pipelines.training.nodes import check_data, train_model


def create_pipeline() -> Pipeline:
    """Sequences in, weights and training history out."""
    return Pipeline(
        [
            Node(
                check_data,
                inputs=["train_sequences", "validation_sequences", "params:data_processing"],
                outputs="training_data",
                name="check_data",
            ),
            Node(
                train_model,
                inputs=["training_data", "checkpoints", "params:training", "params:evaluation"],
                outputs=["model_weights", "training_history"],
                name="train_model",
            ),
        ],
        namespace="training",
        prefix_datasets_with_namespace=False,
    )
