"""Wiring of the sweep pipeline."""

from __future__ import annotations

from kedro.pipeline import Node, Pipeline

from sce_pipeline.pipelines.sweep.nodes import choose_sweep, measure_data, run_sweep


def create_pipeline() -> Pipeline:
    """Prepared sequences and a sweep's name in, a table of its trials out."""
    return Pipeline(
        [
            Node(
                choose_sweep,
                inputs=["params:sweep", "params:sweeps"],
                outputs="chosen_sweep",
                name="choose_sweep",
            ),
            Node(
                measure_data,
                inputs="train_sequences",
                outputs="data_sizes",
                name="measure_data",
            ),
            Node(
                run_sweep,
                inputs=[
                    "chosen_sweep",
                    "data_sizes",
                    "run_request",
                    "params:sweep_options",
                    "sweep_folder",
                ],
                outputs="sweep_trials",
                name="run_sweep",
            ),
        ],
        namespace="sweep",
        prefix_datasets_with_namespace=False,
    )
