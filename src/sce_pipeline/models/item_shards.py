"""An item table whose rows are spread over ranks: who holds what, initial values, input embeddings.

No autograd graph joins the embeddings and the table, so a step of training is::

    embeddings = lookup(shard, items, first_item=…, n_items=…, counts=…).requires_grad_()
    loss = …  # of the embeddings and, by sharded_cross_entropy, of shard
    loss.backward()
    add_gradient(shard.grad, items, embeddings.grad, first_item=…, counts=…)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist

from sce_pipeline.collectives import gather_rows, sum_rows

BLOCK_ROWS = 2**16
"""Rows that are drawn at a time. Initial values depend on it."""


def item_range(n_items: int, rank: int, world: int) -> range:
    """Return the items whose rows ``rank`` holds: as many as another rank, or one more or less.

    Raises:
        ValueError: There are fewer items than ranks.
    """
    if n_items < world:
        raise ValueError(f"expected at least one item for each rank, got {n_items} for {world}")
    return range(rank * n_items // world, (rank + 1) * n_items // world)


def initial_rows(items: range, n_items: int, hidden_size: int, seed: int) -> Tensor:
    """Return some rows of a freshly initialised table, float32 [len(items), d], on the CPU.

    The whole table is Xavier uniform (Glorot & Bengio, 2010). Each block of ``BLOCK_ROWS`` rows has
    a generator of its own, so that a row's values depend on the seed, not on who asks for it.

    Args:
        items: Which rows.
        n_items: Rows of the whole table.
        hidden_size: Size d of a row.
        seed: At least 0.
    """
    bound = math.sqrt(6 / (n_items + hidden_size))
    rows = torch.empty(len(items), hidden_size)
    for start in range(items.start // BLOCK_ROWS * BLOCK_ROWS, items.stop, BLOCK_ROWS):
        generator = np.random.default_rng([seed, start // BLOCK_ROWS])
        block = generator.random((BLOCK_ROWS, hidden_size), dtype=np.float32)
        first, last = max(start, items.start), min(start + BLOCK_ROWS, items.stop)
        values = torch.from_numpy(block[first - start : last - start])
        rows[first - items.start : last - items.start] = values.mul_(2 * bound).sub_(bound)
    return rows


@torch.no_grad()
def lookup(
    shard: Tensor,
    items: Tensor,
    *,
    first_item: int,
    n_items: int,
    counts: Sequence[int],
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Return the embeddings of this rank's items, [counts[rank], d], from whoever holds them.

    Args:
        shard: This rank's rows of the table, floating [rows, d].
        items: int64 [counts[rank]]; the embedding of one outside the catalogue is NaN.
        first_item: The item of the first of the rows.
        n_items: Items of all ranks together.
        counts: How many items each rank looks up; the same on every rank.
        group: The ranks that share the table; all there are where ``None``.

    Raises:
        ValueError: ``counts`` do not fit the group or these items.
    """
    items = gather_rows(items, counts, group)
    index, elsewhere = _place(items, first_item, len(shard))
    rows = shard.index_select(0, index).masked_fill_(elsewhere, 0.0)
    rows.masked_fill_(((items < 0) | (items >= n_items))[:, None], torch.nan)
    return sum_rows(rows, counts, group)  # but one of the terms are 0: exact in any dtype


@torch.no_grad()
def add_gradient(
    shard_gradient: Tensor,
    items: Tensor,
    gradient: Tensor,
    *,
    first_item: int,
    counts: Sequence[int],
    group: dist.ProcessGroup | None = None,
) -> None:
    """Add the gradient of looked-up embeddings to that of the table, in place, on every rank.

    Args:
        shard_gradient: Gradient of this rank's rows of the table, [rows, d].
        items: What this rank looked up, int64 [counts[rank]].
        gradient: Gradient of the embeddings, [counts[rank], d].
        first_item: The item of the first of the rows.
        counts: How many items each rank looked up; the same on every rank.
        group: The ranks that share the table; all there are where ``None``.

    Raises:
        ValueError: ``counts`` do not fit the group or these items.
    """
    items = gather_rows(items, counts, group)
    gradient = gather_rows(gradient.to(shard_gradient.dtype), counts, group)
    index, elsewhere = _place(items, first_item, len(shard_gradient))
    # Unlike index_add_, this adds up in the same order every time, on a GPU too.
    shard_gradient.index_put_((index,), gradient.masked_fill_(elsewhere, 0.0), accumulate=True)


def _place(items: Tensor, first_item: int, n_rows: int) -> tuple[Tensor, Tensor]:
    """Return a row for each item, and where the item's own is on another rank, bool [items, 1].

    Other ranks' items are spread over the rows: were all given the same one, what is then added to
    it, if only zeros, would have to wait in one line.
    """
    offset = items - first_item
    return offset.remainder(n_rows), ((offset < 0) | (offset >= n_rows))[:, None]
