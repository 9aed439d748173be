"""The project's pipelines, found by folder; ``__default__`` runs all stages once, so no sweep."""

from __future__ import annotations

from kedro.framework.project import find_pipelines
from kedro.pipeline import Pipeline

ON_REQUEST = frozenset(
    {
        "baselines",
        "comparison",
        "download",
        "export",
        "profiling",
        "recommendation",
        "suggest",
        "sweep",
        "synthetic",
    }
)
"""Pipelines that are no stage of a run."""


def register_pipelines() -> dict[str, Pipeline]:
    """Name every pipeline under ``pipelines/``, and the sum of the stages, ``__default__``."""
    pipelines = find_pipelines(raise_errors=True)
    stages = (pipeline for name, pipeline in pipelines.items() if name not in ON_REQUEST)
    pipelines["__default__"] = sum(stages, start=Pipeline([]))
    return pipelines
