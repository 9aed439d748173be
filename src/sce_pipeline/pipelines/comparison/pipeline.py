"""Wiring of the comparison."""

from __future__ import annotations

from kedro.pipeline import Node, Pipeline

from sce_pipeline.pipelines.comparison.figures import (
    plot_by_history_length,
    plot_by_popularity,
    plot_quality_against_cost,
)
from sce_pipeline.pipelines.comparison.nodes import (
    average_seeds,
    collect_figures,
    collect_runs,
    compare_pairs,
    plot_all_validation_curves,
    rank_runs,
    select_best,
    write_report,
)


def create_pipeline() -> Pipeline:
    """All runs on a data set in; tables, figures and one report out."""
    return Pipeline(
        [
            Node(
                collect_runs,
                inputs=[
                    "run_histories",
                    "run_metrics",
                    "run_rankings",
                    "test_sequences",
                    "params:dataset",
                ],
                outputs="compared_runs",
                name="collect_runs",
            ),
            Node(
                select_best,
                inputs="compared_runs",
                outputs="best_runs",
                name="select_best",
            ),
            Node(
                rank_runs,
                inputs=[
                    "compared_runs",
                    "params:training",
                    "params:data_processing",
                    "params:loss_presets",
                    "params:model_presets",
                ],
                outputs=["leaderboard", "leaderboard_json"],
                name="rank_runs",
            ),
            Node(
                average_seeds,
                inputs="leaderboard",
                outputs=["seed_averages", "seed_averages_json"],
                name="average_seeds",
            ),
            Node(
                compare_pairs,
                inputs=["compared_runs", "best_runs", "params:comparison", "params:evaluation"],
                outputs=["significance", "significance_json"],
                name="compare_pairs",
            ),
            Node(
                plot_quality_against_cost,
                inputs="leaderboard",
                outputs="quality_against_cost_figure",
                name="plot_quality_against_cost",
            ),
            Node(
                plot_all_validation_curves,
                inputs="compared_runs",
                outputs="validation_curves_figure",
                name="plot_validation_curves",
            ),
            Node(
                plot_by_popularity,
                inputs=["best_runs", "item_popularity"],
                outputs="quality_by_popularity_figure",
                name="plot_by_popularity",
            ),
            Node(
                plot_by_history_length,
                inputs=["best_runs", "test_sequences"],
                outputs="quality_by_history_length_figure",
                name="plot_by_history_length",
            ),
            Node(
                collect_figures,
                inputs=[
                    "quality_against_cost_figure",
                    "validation_curves_figure",
                    "quality_by_popularity_figure",
                    "quality_by_history_length_figure",
                ],
                outputs="comparison_figures",
                name="collect_figures",
            ),
            Node(
                write_report,
                inputs=[
                    "compared_runs",
                    "leaderboard",
                    "seed_averages",
                    "significance",
                    "comparison_figures",
                ],
                outputs="comparison_report",
                name="write_report",
            ),
        ],
        namespace="comparison",
        prefix_datasets_with_namespace=False,
    )
