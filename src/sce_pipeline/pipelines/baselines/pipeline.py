"""Wiring of the baselines."""

from __future__ import annotations

from kedro.pipeline import Node, Pipeline

from sce_pipeline.pipelines.baselines.nodes import (
    collect_interactions,
    measure_baselines,
    rank_by_item_knn,
    rank_by_pure_svd,
)


def create_pipeline() -> Pipeline:
    """Fit the baselines, rank the test users' items by each, and measure them."""
    fitted_on = ["interaction_matrix", "test_sequences", "params:baselines", "params:evaluation"]
    return Pipeline(
        [
            Node(
                collect_interactions,
                inputs=[
                    "train_sequences",
                    "test_sequences",
                    "params:data_processing",
                    "params:baselines",
                ],
                outputs=["interaction_matrix", "baseline_record"],
                name="collect_interactions",
            ),
            Node(
                rank_by_item_knn,
                inputs=fitted_on,
                outputs="item_knn_rankings",
                name="rank_by_item_knn",
            ),
            Node(
                rank_by_pure_svd,
                inputs=fitted_on,
                outputs="pure_svd_rankings",
                name="rank_by_pure_svd",
            ),
            Node(
                measure_baselines,
                inputs=[
                    "item_knn_rankings",
                    "pure_svd_rankings",
                    "item_popularity",
                    "params:evaluation",
                ],
                outputs="baseline_metrics",
                name="measure_baselines",
            ),
        ],
        namespace="baselines",
        prefix_datasets_with_namespace=False,
    )
