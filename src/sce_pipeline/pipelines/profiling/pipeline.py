"""Wiring of the profiling pipeline."""

from __future__ import annotations

from kedro.pipeline import Node, Pipeline

from sce_pipeline.pipelines.profiling.figures import plot_best_losses, plot_memory, plot_time
from sce_pipeline.pipelines.profiling.nodes import profile_losses


def create_pipeline() -> Pipeline:
    """Sizes and losses in, a table of what steps cost and figures of it out; needs no data."""
    return Pipeline(
        [
            Node(
                profile_losses,
                inputs=["params:profiling", "params:training", "params:loss_presets"],
                outputs="loss_profile",
                name="profile_losses",
            ),
            Node(
                plot_memory,
                inputs="loss_profile",
                outputs="loss_memory_figure",
                name="plot_memory",
            ),
            Node(plot_time, inputs="loss_profile", outputs="loss_time_figure", name="plot_time"),
            Node(
                plot_best_losses,
                inputs="loss_profile",
                outputs="best_losses_figure",
                name="plot_best_losses",
            ),
        ],
        namespace="profiling",
        prefix_datasets_with_namespace=False,
    )
