"""Wiring of recommendations."""

from __future__ import annotations

from kedro.pipeline import Node, Pipeline

from sce_pipeline.pipelines.recommendation.nodes import (
    choose_candidates,
    collect_histories,
    describe_request,
    load_recommender,
    recommend_items,
)


def create_pipeline() -> Pipeline:
    """List the best items for every history, partition after partition."""
    return Pipeline(
        [
            Node(
                load_recommender,
                inputs=["model_weights", "training_history", "params:recommendation"],
                outputs="recommender",
                name="load_recommender",
            ),
            Node(
                choose_candidates,
                inputs=[
                    "items",
                    "allowed_items",
                    "denied_items",
                    "params:recommendation",
                    "params:data_processing",
                ],
                outputs="candidates",
                name="choose_candidates",
            ),
            Node(
                collect_histories,
                inputs=[
                    "interactions",
                    "new_histories",
                    "items",
                    "params:recommendation",
                    "params:data_processing",
                ],
                outputs=["histories", "users_without_recommendations"],
                name="collect_histories",
            ),
            Node(
                describe_request,
                inputs=["recommender", "candidates", "histories", "params:recommendation"],
                outputs=["recommendation_request", "recommendation_requests"],
                name="describe_request",
            ),
            Node(
                recommend_items,
                inputs=[
                    "recommender",
                    "candidates",
                    "histories",
                    "recommendation_request",
                    "params:recommendation",
                ],
                outputs=["recommendations", "recommendation_report"],
                name="recommend_items",
            ),
        ],
        namespace="recommendation",
        prefix_datasets_with_namespace=False,
    )
