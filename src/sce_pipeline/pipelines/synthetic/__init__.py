"""Outside the stages: a log with a planted structure, and how well it can be predicted at best."""

from sce_pipeline.pipelines.synthetic.pipeline import create_pipeline

__all__ = ["create_pipeline"]
