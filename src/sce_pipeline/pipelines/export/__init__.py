"""The pipeline of exports: a trained model in, a folder out that is served without Kedro."""

from sce_pipeline.pipelines.export.pipeline import create_pipeline

__all__ = ["create_pipeline"]
