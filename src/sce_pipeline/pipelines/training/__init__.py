"""From sequences to trained weights."""

from sce_pipeline.pipelines.training.pipeline import create_pipeline

__all__ = ["create_pipeline"]
