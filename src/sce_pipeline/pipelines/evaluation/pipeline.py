"""The nodes of the evaluation stage, wired."""

from __future__ import annotations

from kedro.pipeline import Node, Pipeline

from sce_pipeline.pipelines.evaluation.nodes import (
    measure_rankings,
    rank_by_popularity,
    rank_items,
)


def create_pipeline() -> Pipeline:
    """Rank the test users' items by the model and by popularity, and measure both."""
    return Pipeline(
        [
            Node(
                rank_items,
                inputs=[
                    "model_weights",
                    "training_history",
                    "test_sequences",
                    "params:evaluation",
                    "params:data_processing",
                ],
                outputs="test_rankings",
                name="rank_items",
            ),
            Node(
                rank_by_popularity,
                inputs=["item_popularity", "test_sequences", "params:evaluation"],
                outputs="popularity_rankings",
                name="rank_by_popularity",
            ),
            Node(
                measure_rankings,
                inputs=[
                    "test_rankings",
                    "popularity_rankings",
                    "item_popularity",
                    "params:evaluation",
                ],
                outputs="metrics",
                name="measure_rankings",
            ),
        ],
        namespace="evaluation",
        prefix_datasets_with_namespace=False,
    )
