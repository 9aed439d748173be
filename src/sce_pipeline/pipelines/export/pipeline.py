"""Wiring of exports."""

from __future__ import annotations

from kedro.pipeline import Node, Pipeline

from sce_pipeline.pipelines.export.nodes import bundle_recommender, describe_model


def create_pipeline() -> Pipeline:
    """Put a trained model, its items and what is known of it into one folder."""
    return Pipeline(
        [
            Node(
                describe_model,
                inputs=[
                    "model_weights",
                    "training_history",
                    "measured_versions",
                    "items",
                    "params:dataset",
                ],
                outputs="model_facts",
                name="describe_model",
            ),
            Node(
                bundle_recommender,
                inputs=[
                    "model_weights",
                    "items",
                    "model_facts",
                    "params:export",
                    "held_out_sequences",
                ],
                outputs="exported_recommender",
                name="bundle_recommender",
            ),
        ],
        namespace="export",
        prefix_datasets_with_namespace=False,
    )
