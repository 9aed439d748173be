"""Rows that the ranks of a process group hold some of each: brought together, or added up.

Ranks may hold different numbers of rows, and none: the numbers are known to every host beforehand,
so that nothing is padded and no host waits for its device to learn a size. Both functions are
exchanges in which each rank sends something to each other, as that is the one collective that takes
unequal numbers on NCCL and on Gloo.
"""

from __future__ import annotations

from collections.abc import Sequence

# Its functions keep the default group that there is when they are first imported, as optimisers do
# when they are made: unless that is before there is one, no process group is ever destroyed, and a
# process whose threads of Gloo are still there may abort when it ends.
import torch.distributed.nn  # noqa: F401
from torch import Tensor
from torch import distributed as dist


def gather_rows(
    rows: Tensor, counts: Sequence[int], group: dist.ProcessGroup | None = None
) -> Tensor:
    """Return the rows of all ranks, in the order of the ranks: [sum(counts), ...].

    Args:
        rows: This rank's rows, [counts[rank], ...].
        counts: How many rows each rank holds; the same on every rank.
        group: The ranks that take part; all there are where ``None``.

    Raises:
        ValueError: ``counts`` do not fit the group or these rows.
    """
    _check(counts, group, rank_rows=len(rows))
    gathered = rows.new_empty((sum(counts), *rows.shape[1:]))
    copies = rows.repeat(len(counts), *(1 for _ in rows.shape[1:]))
    dist.all_to_all_single(gathered, copies, list(counts), [len(rows)] * len(counts), group=group)
    return gathered


def sum_rows(rows: Tensor, counts: Sequence[int], group: dist.ProcessGroup | None = None) -> Tensor:
    """Add up what the ranks have for each row, and return the sums of this rank's rows.

    It is a reduce-scatter whose sums do not depend on the algorithm that a backend chooses: terms
    are added on the rank that keeps them.

    Args:
        rows: This rank's terms of all rows, in the order of the ranks, [sum(counts), ...].
        counts: How many rows each rank keeps; the same on every rank.
        group: The ranks that take part; all there are where ``None``.

    Raises:
        ValueError: ``counts`` do not fit the group or these rows.
    """
    _check(counts, group, all_rows=len(rows))
    own = counts[dist.get_rank(group)]
    terms = rows.new_empty((len(counts) * own, *rows.shape[1:]))
    dist.all_to_all_single(terms, rows.contiguous(), [own] * len(counts), list(counts), group=group)
    return terms.view(len(counts), own, *rows.shape[1:]).sum(0)


def _check(
    counts: Sequence[int],
    group: dist.ProcessGroup | None,
    *,
    rank_rows: int | None = None,
    all_rows: int | None = None,
) -> None:
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    if len(counts) != world:
        raise ValueError(f"expected counts of the {world} ranks, got {list(counts)}")
    if rank_rows is not None and counts[rank] != rank_rows:
        raise ValueError(f"counts[{rank}] is {counts[rank]}, but rank {rank} has {rank_rows} rows")
    if all_rows is not None and sum(counts) != all_rows:
        raise ValueError(f"counts are {sum(counts)} in all, but there are {all_rows} rows")
