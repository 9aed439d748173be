"""The nearest of many random directions to each row, without the matrix of inner products."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sce_pipeline.losses.kernels.common import INTERPRETED, cdiv, launch, padded
from sce_pipeline.losses.kernels.rows import load_rows

NO_COLUMN = tl.constexpr(2**30)


class Tile(NamedTuple):
    """How much a program of the kernel holds at a time."""

    rows: int
    projections: int
    warps: int
    stages: int


def tile_for(d: int, dtype: torch.dtype) -> Tile:
    """Return the tile for rows of size ``d`` and factors of ``dtype``."""
    size = d * dtype.itemsize
    if size <= 256:
        return Tile(rows=128, projections=32, warps=4, stages=4)
    if size <= 1024:
        return Tile(rows=64, projections=64, warps=4, stages=2)
    return Tile(rows=32, projections=32, warps=4, stages=1)


def nearest_projections(
    rows: Tensor, projections: Tensor, dtype: torch.dtype, tile: Tile | None = None
) -> Tensor:
    """Return which projection has the largest inner product with each row, [rounds, n].

    Of equal ones, the first. Factors of float32 are rounded to TF32.

    Args:
        rows: [n, d].
        projections: [rounds, n_projections, d].
        dtype: What both are cast to.
        tile: Sizes other than those of ``tile_for``.

    Returns:
        int16 [rounds, n], or int32 where there are 2^15 projections or more.
    """
    rows, projections = rows.contiguous(), projections.to(dtype).contiguous()
    n_rows, d = rows.shape
    n_rounds, n_projections, _ = projections.shape
    tile = tile or tile_for(d, dtype)
    number = torch.int16 if n_projections < 2**15 else torch.int32
    nearest = torch.empty(n_rounds, n_rows, dtype=number, device=rows.device)
    launch(
        _nearest_kernel,
        (cdiv(n_rows, tile.rows), n_rounds),
        rows,
        projections,
        nearest,
        n_rows,
        n_projections,
        D=d,
        BLOCK_ROWS=tile.rows,
        BLOCK_PROJECTIONS=tile.projections,
        BLOCK_D=padded(d),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return nearest


@triton.jit(do_not_specialize=["n_rows", "n_projections"])
def _nearest_kernel(
    rows,
    projections,
    nearest,
    n_rows,
    n_projections,
    D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_PROJECTIONS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program holds some rows and goes over all projections of one round."""
    round_ = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    lane = tl.arange(0, BLOCK_PROJECTIONS)
    x = load_rows(rows, row, row < n_rows, 0, D, BLOCK_D).to(projections.dtype.element_ty)
    projections += round_ * n_projections * D

    # Each lane keeps its own best, so that lanes are compared once, at the end.
    best = tl.full([BLOCK_ROWS, BLOCK_PROJECTIONS], float("-inf"), tl.float32)
    best_start = tl.zeros([BLOCK_ROWS, BLOCK_PROJECTIONS], tl.int32)
    for start in range(0, n_projections, BLOCK_PROJECTIONS):
        projection = start + lane
        live = projection < n_projections
        directions = load_rows(projections, projection, live, 0, D, BLOCK_D)
        scores = tl.where(live[None, :], _rough_product(x, tl.trans(directions)), float("-inf"))
        better = scores > best
        best = tl.where(better, scores, best)
        best_start = tl.where(better, start, best_start)

    largest = tl.max(best, 1)
    column = tl.where(best == largest[:, None], best_start + lane[None, :], NO_COLUMN)
    tl.store(
        nearest + round_ * n_rows + row,
        tl.min(column, 1).to(nearest.dtype.element_ty),
        mask=row < n_rows,
    )


@triton.jit
def _rough_product(a, b):
    """Return ``a @ b``, with factors of float32 rounded to TF32: random directions need no more."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    return tl.dot(a, b, input_precision="tf32")
