"""Wiring of the reporting pipeline."""

from __future__ import annotations

from kedro.pipeline import Node, Pipeline

from sce_pipeline.pipelines.reporting.figures import (
    plot_history_lengths,
    plot_item_popularity,
    plot_metrics,
    plot_training_curve,
    plot_training_time,
)
from sce_pipeline.pipelines.reporting.nodes import report_run, show_recommendations


def create_pipeline() -> Pipeline:
    """Results of the other stages in, figures and tables out."""
    return Pipeline(
        [
            Node(
                plot_item_popularity,
                inputs="item_popularity",
                outputs="item_popularity_figure",
                name="plot_item_popularity",
            ),
            Node(
                plot_history_lengths,
                inputs="data_summary",
                outputs="history_lengths_figure",
                name="plot_history_lengths",
            ),
            Node(
                plot_training_curve,
                inputs="training_history",
                outputs="training_curve_figure",
                name="plot_training_curve",
            ),
            Node(
                plot_training_time,
                inputs="training_history",
                outputs="training_time_figure",
                name="plot_training_time",
            ),
            Node(plot_metrics, inputs="metrics", outputs="metrics_figure", name="plot_metrics"),
            Node(
                show_recommendations,
                inputs=["test_rankings", "test_sequences", "items", "users", "training_history"],
                outputs="example_recommendations",
                name="show_recommendations",
            ),
            Node(
                report_run,
                inputs=[
                    "metrics",
                    "example_recommendations",
                    "training_history",
                    "params:dataset",
                    "params:evaluation",
                ],
                outputs="run_report",
                name="report_run",
            ),
        ],
        namespace="reporting",
        prefix_datasets_with_namespace=False,
    )
