"""Which loss and settings suit a data set on this device, before anything is trained."""

from sce_pipeline.pipelines.suggest.pipeline import create_pipeline

__all__ = ["create_pipeline"]
