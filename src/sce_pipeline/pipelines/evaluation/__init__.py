"""The evaluation stage: a trained model and held-out users in, metrics out."""

from sce_pipeline.pipelines.evaluation.pipeline import create_pipeline

__all__ = ["create_pipeline"]
