"""The nodes that make a synthetic data set, wired."""

from __future__ import annotations

from kedro.pipeline import Node, Pipeline

from sce_pipeline.pipelines.synthetic.nodes import draw_interactions, find_best_metrics


def create_pipeline() -> Pipeline:
    """Write a synthetic log and the best metrics that anything can reach on it."""
    return Pipeline(
        [
            Node(
                draw_interactions,
                inputs=["params:synthetic", "params:data_processing"],
                outputs="synthetic_interactions",
                name="draw_interactions",
            ),
            Node(
                find_best_metrics,
                inputs=["params:synthetic", "params:data_processing", "params:evaluation"],
                outputs="synthetic_oracle",
                name="find_best_metrics",
            ),
        ],
        namespace="synthetic",
        prefix_datasets_with_namespace=False,
    )
