"""Nodes of the profiling pipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import polars as pl

from sce_pipeline.parameters import ProfilingParameters, TrainingParameters
from sce_pipeline.pipelines.comparison.tables import describe_changes
from sce_pipeline.profiling.candidates import choose_losses
from sce_pipeline.profiling.grid import Cell, measure_grid
from sce_pipeline.profiling.steps import describe_device, device_of

MEGABYTE = 2**20

SCHEMA = {
    "loss": pl.String,
    "changes": pl.String,
    "n_items": pl.Int64,
    "batch_size": pl.Int64,
    "length": pl.Int64,
    "status": pl.String,
    "step_ms": pl.Float64,
    "loss_ms": pl.Float64,
    "peak_allocated_mb": pl.Float64,
    "parameters_mb": pl.Float64,
    "gradients_mb": pl.Float64,
    "optimiser_mb": pl.Float64,
    "activations_mb": pl.Float64,
    "loss_mb": pl.Float64,
    "other_mb": pl.Float64,
    "peak_reserved_mb": pl.Float64,
    "precision": pl.String,
    "device": pl.String,
}
"""Columns of the table; of each loss, what differs from its preset; of memory, what PyTorch has
allocated, and from a GPU reserved."""


def profile_losses(
    profiling: ProfilingParameters, training: TrainingParameters, loss_presets: dict[str, Any]
) -> pl.DataFrame:
    """Measure losses over a grid of sizes; returns a row for each loss at each size."""
    grid = profiling.grid
    losses = choose_losses(grid.by_name(), loss_presets, training.loss)
    cells = measure_grid(grid, losses, training, profiling.effort)
    changes = {
        name: describe_changes(loss.model_dump(mode="json"), loss_presets[name])
        for name, loss in losses.items()
    }
    return tabulate(cells, changes, describe_device(device_of(training)))


def tabulate(cells: Sequence[Cell], changes: Mapping[str, str | None], device: str) -> pl.DataFrame:
    """Lay out cells, a row each; what does not fit or is too slow has no figures.

    Args:
        cells: What was measured.
        changes: In what each loss differs from its preset, by its name.
        device: Its name.
    """
    rows = [{**_row(cell), "changes": changes[cell.loss], "device": device} for cell in cells]
    return pl.DataFrame(rows, schema=SCHEMA)


def _row(cell: Cell) -> dict[str, Any]:
    row: dict[str, Any] = {
        name: getattr(cell, name) for name in ("loss", "n_items", "batch_size", "length", "status")
    }
    cost = cell.cost
    if cost is None:
        return row
    parts = {f"{name}_mb": size / MEGABYTE for name, size in asdict(cost.memory).items()}
    return {
        **row,
        **parts,
        "step_ms": 1000 * cost.step_seconds,
        "loss_ms": 1000 * cost.loss_seconds,
        "peak_allocated_mb": cost.memory.peak / MEGABYTE,
        "peak_reserved_mb": None if cost.reserved is None else cost.reserved / MEGABYTE,
        "precision": cost.precision,
    }
