"""What losses cost on this device over a grid of catalogues and batches: a table and figures."""

from sce_pipeline.pipelines.profiling.pipeline import create_pipeline

__all__ = ["create_pipeline"]
