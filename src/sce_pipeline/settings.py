"""Kedro's settings of the project."""

from __future__ import annotations

from sce_pipeline.hooks import (
    CheckpointHooks,
    NodeCostHooks,
    OneRunHooks,
    ParameterHooks,
    ReportHooks,
    SweepHooks,
    VersionHooks,
)
from sce_pipeline.resolvers import choose, merge
from sce_pipeline.spark import SparkHooks
from sce_pipeline.tracking import TrackingHooks

HOOKS = (
    ParameterHooks(),
    SweepHooks(),
    VersionHooks(),
    NodeCostHooks(),
    CheckpointHooks(),
    TrackingHooks(),
    ReportHooks(),
    OneRunHooks(),
    SparkHooks(),
)

# .telemetry says no in the repository; this says it wherever the package runs.
DISABLE_HOOKS_FOR_PLUGINS = ("kedro-telemetry",)

CONFIG_LOADER_ARGS = {
    "base_env": "base",
    "default_run_env": "local",
    # An experiment or --params changes single values and keeps their neighbours.
    "merge_strategy": {"globals": "soft", "parameters": "soft"},
    "config_patterns": {"spark": ["spark.yml"]},
    "custom_resolvers": {"choose": choose, "merge": merge},
}
