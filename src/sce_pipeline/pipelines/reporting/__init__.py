"""Figures and tables about a run and its data."""

from sce_pipeline.pipelines.reporting.pipeline import create_pipeline

__all__ = ["create_pipeline"]
