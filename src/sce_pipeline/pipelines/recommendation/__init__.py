"""The pipeline of recommendations: a trained model and whole histories in, lists of items out."""

from sce_pipeline.pipelines.recommendation.pipeline import create_pipeline

__all__ = ["create_pipeline"]
