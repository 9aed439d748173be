"""Outside the stages: public logs brought to where the data stage reads them."""

from sce_pipeline.pipelines.download.pipeline import create_pipeline

__all__ = ["create_pipeline"]
