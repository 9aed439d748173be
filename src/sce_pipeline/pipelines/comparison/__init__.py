"""All runs on a data set held against each other: tables, significance, figures, one report."""

from sce_pipeline.pipelines.comparison.pipeline import create_pipeline

__all__ = ["create_pipeline"]
