"""Baselines beside the models: training interactions and held-out users in, metrics out."""

from sce_pipeline.pipelines.baselines.pipeline import create_pipeline

__all__ = ["create_pipeline"]
