"""The nodes of the data stage, wired."""

from __future__ import annotations

from kedro.pipeline import Node, Pipeline

from sce_pipeline.pipelines.data_processing.nodes import (
    build_sequences,
    clean_interactions,
    encode_interactions,
    filter_interactions,
    split_interactions,
    summarise_data,
)


def create_pipeline() -> Pipeline:
    """Turn a raw log into sequences, and account for every row."""
    return Pipeline(
        [
            Node(
                clean_interactions,
                inputs=["raw_interactions", "params:data_processing"],
                outputs=["interactions", "rejected_interactions", "cleaning_report"],
                name="clean_interactions",
            ),
            Node(
                filter_interactions,
                inputs=["interactions", "params:data_processing"],
                outputs=["filtered_interactions", "filter_report"],
                name="filter_interactions",
            ),
            Node(
                split_interactions,
                inputs=["filtered_interactions", "params:data_processing"],
                outputs=["split_interactions", "split_report"],
                name="split_interactions",
            ),
            Node(
                encode_interactions,
                inputs=["split_interactions", "item_titles", "params:data_processing"],
                outputs=["encoded_interactions", "items", "users"],
                name="encode_interactions",
            ),
            Node(
                build_sequences,
                inputs=["encoded_interactions", "items", "params:data_processing"],
                outputs=[
                    "train_sequences",
                    "validation_sequences",
                    "test_sequences",
                    "item_popularity",
                    "sequence_report",
                ],
                name="build_sequences",
            ),
            Node(
                summarise_data,
                inputs=[
                    "cleaning_report",
                    "filter_report",
                    "split_report",
                    "sequence_report",
                    "items",
                ],
                outputs="data_summary",
                name="summarise_data",
            ),
        ],
        namespace="data_processing",
        prefix_datasets_with_namespace=False,
    )
