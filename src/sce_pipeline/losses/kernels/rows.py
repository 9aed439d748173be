"""Rows of a matrix, gathered by number, and their inner products."""

from __future__ import annotations

import triton
import triton.language as tl

from sce_pipeline.losses.kernels.common import INTERPRETED, dot


@triton.jit
def load_rows(matrix, rows, valid, first_column, D: tl.constexpr, WIDTH: tl.constexpr):
    """Return WIDTH columns of ``matrix[rows]``: 0 where not ``valid`` and from column D on."""
    column = first_column + tl.arange(0, WIDTH)
    pointers = matrix + rows.to(tl.int64)[:, None] * D + column[None, :]
    return tl.load(pointers, mask=valid[:, None] & (column < D)[None, :], other=0.0)


@triton.jit
def cast(values, DTYPE: tl.constexpr):
    """Return ``values`` in ``DTYPE``, rounded to nearest.

    The interpreter truncates to bfloat16: there, the bits to be cut are rounded away before.
    """
    if INTERPRETED and DTYPE == tl.bfloat16 and values.dtype == tl.float32:
        bits = values.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        values = tl.where(values == values, bits.to(tl.float32, bitcast=True), values)
    return values.to(DTYPE)


@triton.jit
def row_products(
    factor,
    matrix,
    rows,
    valid,
    others_matrix,
    others,
    others_valid,
    D: tl.constexpr,
    STEP: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Return the inner products of some rows and other rows, [rows, others].

    Args:
        factor: The rows in ``DTYPE``, read where they are no wider than STEP.
        matrix: Where the rows are from, to be read STEP columns at a time where they are wider:
            products of float32 need room for the parts of their factors.
        rows: Their numbers.
        valid: Which of them are there.
        others_matrix: Where the others are from.
        others: Their numbers.
        others_valid: Which of them are there.
        D: Columns of both matrices.
        STEP: Columns multiplied at a time.
        DTYPE: What factors are cast to.
    """
    products = tl.zeros([rows.shape[0], others.shape[0]], tl.float32)
    if D <= STEP:
        other = cast(load_rows(others_matrix, others, others_valid, 0, D, STEP), DTYPE)
        products = dot(factor, tl.trans(other), products)
    else:
        for first in range(0, D, STEP):
            part = cast(load_rows(matrix, rows, valid, first, D, STEP), DTYPE)
            other = cast(load_rows(others_matrix, others, others_valid, first, D, STEP), DTYPE)
            products = dot(part, tl.trans(other), products)
    return products
