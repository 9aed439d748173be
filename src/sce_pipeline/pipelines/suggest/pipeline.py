"""Wiring of the suggest pipeline."""

from __future__ import annotations

from kedro.pipeline import Node, Pipeline

from sce_pipeline.pipelines.suggest.nodes import (
    measure_losses,
    report_suggestion,
    suggest_settings,
)


def create_pipeline() -> Pipeline:
    """Training sequences in, measured losses and what is best made of them out."""
    return Pipeline(
        [
            Node(
                measure_losses,
                inputs=[
                    "train_sequences",
                    "params:data_processing",
                    "params:training",
                    "params:profiling",
                    "params:loss_presets",
                ],
                outputs="loss_candidates",
                name="measure_losses",
            ),
            Node(
                suggest_settings,
                inputs=[
                    "loss_candidates",
                    "params:dataset",
                    "params:training",
                    "params:profiling",
                ],
                outputs="suggestion",
                name="suggest_settings",
            ),
            Node(
                report_suggestion,
                inputs="suggestion",
                outputs="suggestion_report",
                name="report_suggestion",
            ),
        ],
        namespace="suggest",
        prefix_datasets_with_namespace=False,
    )
