"""The data stage: a raw log in, sequences out, with a count of what every step dropped."""

from sce_pipeline.pipelines.data_processing.pipeline import create_pipeline

__all__ = ["create_pipeline"]
