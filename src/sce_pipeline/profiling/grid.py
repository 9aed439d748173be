"""What losses cost over a grid of catalogues and batches."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np

from sce_pipeline.parameters import (
    LossParameters,
    ProfilingEffort,
    ProfilingGrid,
    TrainingParameters,
)
from sce_pipeline.profiling.steps import Cost, measure_cost, on_one_device

logger = logging.getLogger(__name__)

MEMORY_STEPS = 2
"""Steps that ``measure_cost`` takes before those of its effort."""

Status = Literal["fits", "does not fit", "too slow"]


@dataclass(frozen=True)
class Cell:
    """A loss at a size.

    Attributes:
        loss: Its name.
        n_items: Size of the catalogue.
        batch_size: Sequences in a step.
        length: Tokens of each.
        status: Whether it fits, does not, or was not tried since it took too long at a size that
            is nowhere larger.
        cost: What was measured, where it fits.
    """

    loss: str
    n_items: int
    batch_size: int
    length: int
    status: Status
    cost: Cost | None


def measure_grid(
    grid: ProfilingGrid,
    losses: Mapping[str, LossParameters],
    training: TrainingParameters,
    effort: ProfilingEffort,
) -> list[Cell]:
    """Measure every loss at every size, on random sequences of full length.

    Args:
        grid: The sizes.
        losses: The losses by name, in the order in which they are measured.
        training: Model and optimisation; batches are those of the grid, each computed at once.
        effort: How many steps are timed, and which step is too slow to go on to larger sizes.
    """
    sizes = list(product(losses, sorted(grid.n_items), sorted(grid.batch_size)))
    cells: list[Cell] = []
    for number, (loss, n_items, batch_size) in enumerate(sizes, start=1):
        size = loss, n_items, batch_size, grid.length
        if any(_is_slower(cell, size, effort.max_step_seconds) for cell in cells):
            cell = Cell(*size, "too slow", None)
        else:
            n_sequences = batch_size * (MEMORY_STEPS + effort.n_warm_up_steps + effort.n_steps)
            parameters = on_one_device(
                training,
                losses[loss],
                batch_size=batch_size,
                batch_tokens=None,
                accumulation_steps=1,
            )
            sequences = draw_sequences(n_items, n_sequences, grid.length, training.seed)
            cost = measure_cost(sequences, parameters, effort)
            cell = Cell(*size, "does not fit" if cost is None else "fits", cost)
        cells.append(cell)
        logger.info("%d of %d: %s", number, len(sizes), describe(cell))
    return cells


def draw_sequences(n_items: int, n_sequences: int, length: int, seed: int) -> dict[str, np.ndarray]:
    """Draw ``train_sequences`` of random items, a window of ``length`` inputs for each user."""
    generator = np.random.default_rng(seed)
    offsets = np.arange(n_sequences + 1) * (length + 1)
    return {
        "items": generator.integers(n_items, size=offsets[-1], dtype=np.int32),
        "users": np.arange(n_sequences, dtype=np.int32),
        "offsets": offsets,
        "window_starts": offsets[:-1],
        "window_stops": offsets[1:],
        "n_items": np.array([n_items]),
        "max_length": np.array([length]),
    }


def describe(cell: Cell) -> str:
    """Put a cell into words."""
    size = f"{cell.loss}, {cell.batch_size:,} × {cell.length:,} tokens, {cell.n_items:,} items"
    if cell.cost is None:
        return f"{size}: {cell.status}"
    memory = cell.cost.memory
    return (
        f"{size}: {1000 * cell.cost.step_seconds:,.1f} ms a step, {memory.peak / 2**20:,.0f} MB, "
        f"{memory.loss / 2**20:,.0f} of them for the loss"
    )


def _is_slower(cell: Cell, size: tuple[str, int, int, int], max_step_seconds: float) -> bool:
    """Return whether a step took too long at a size that is nowhere larger than ``size``."""
    loss, n_items, batch_size, _ = size
    return (
        cell.loss == loss
        and cell.n_items <= n_items
        and cell.batch_size <= batch_size
        and (
            cell.status == "too slow"
            or (cell.cost is not None and cell.cost.step_seconds > max_step_seconds)
        )
    )
