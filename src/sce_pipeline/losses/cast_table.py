"""An item table in the dtype of matrix products, of which only so much stands at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sce_pipeline.losses.base import at_least_float32

CAST_BYTES = 2**28
"""Most bytes of a cast: those of 2 million rows of 64 in half precision."""

BLOCK_ROWS = 128
"""Ranges end at multiples of it, so that kernels meet whole blocks and aligned addresses."""


def casts_whole(table: Tensor, dtype: torch.dtype) -> bool:
    """Return whether a table in ``dtype`` is the table itself, or of at most ``CAST_BYTES``."""
    return table.dtype == dtype or table.numel() * dtype.itemsize <= CAST_BYTES


class CastTable:
    """The rows of a table, rounded to the dtype of the factors of matrix products.

    Where the cast would take more than ``CAST_BYTES``, ranges of rows are cast each time they are
    passed over. A pass multiplies each number by all tokens, beside which that is next to nothing.

    Args:
        table: [rows, d], at least one; or what ``held`` of a like table was.
        dtype: What rows are rounded to.
        wide: Whether they are widened again to float32 at least, as products in PyTorch need that
            would otherwise be rounded like their factors.

    Attributes:
        held: What is kept: the cast or, where that would take too much, the table.
    """

    def __init__(self, table: Tensor, dtype: torch.dtype, *, wide: bool) -> None:
        self._dtype = dtype
        self._wide = wide
        self.held = table.to(dtype).contiguous() if casts_whole(table, dtype) else table

    def ranges(self) -> Iterator[tuple[slice, Tensor]]:
        """Go through the table in ranges of rows: which they are, and they, until the next."""
        n_rows, d = self.held.shape
        dtype = torch.promote_types(self._dtype, torch.float32) if self._wide else self._dtype
        if self.held.dtype == self._dtype == dtype:
            yield slice(0, n_rows), self.held.contiguous()
            return
        size = max(1, CAST_BYTES // (d * dtype.itemsize))
        size = size // BLOCK_ROWS * BLOCK_ROWS or size
        # One buffer for all: a cast of its own would be made while the last one still stands.
        rounded = self.held.new_empty(min(size, n_rows), d, dtype=self._dtype)
        for start in range(0, n_rows, size):
            rows = slice(start, min(start + size, n_rows))
            yield rows, rounded[: rows.stop - rows.start].copy_(self.held[rows]).to(dtype)

    def take(self, index: Tensor) -> Tensor:
        """Return some rows, by their numbers, int64 [n]."""
        rows = self.held.index_select(0, index).to(self._dtype)
        return at_least_float32(rows) if self._wide else rows

    def sum(self) -> Tensor:
        """Return the sum of all rows, in float32 at least, [d]."""
        wide = torch.promote_types(self._dtype, torch.float32)
        return torch.stack([part.sum(0, dtype=wide) for _, part in self.ranges()]).sum(0)
