"""The sweep pipeline: many runs of the other pipelines, and a table of what they gave."""

from sce_pipeline.pipelines.sweep.pipeline import create_pipeline

__all__ = ["create_pipeline"]
