"""The node that brings a public log, wired."""

from __future__ import annotations

from kedro.pipeline import Node, Pipeline

from sce_pipeline.pipelines.download.nodes import bring_tables


def create_pipeline() -> Pipeline:
    """Fetch a public log and write its tables as raw data."""
    return Pipeline(
        [
            Node(
                bring_tables,
                inputs="public_log",
                outputs="downloaded_tables",
                name="bring_tables",
            ),
        ],
        namespace="download",
        prefix_datasets_with_namespace=False,
    )
