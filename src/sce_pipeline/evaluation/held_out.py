"""Held-out users: the arrays of their histories and targets, and packed blocks of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sce_pipeline.models import Packing

USERS_AT_ONCE = 512
"""Users in a block."""


@dataclass(frozen=True)
class UserBlock:
    """Some held-out users.

    Attributes:
        items: The last items of each user's history, at most as many as the model reads, end to
            end, int64 [tokens].
        packing: Which user each of them belongs to.
        targets: The item that follows each history, int64 [users].
        seen: Where seen items are left out of the ranking, the whole histories: items int64 [total]
            and offsets int64 [users + 1] into them.
    """

    items: Tensor
    packing: Packing
    targets: Tensor
    seen: tuple[Tensor, Tensor] | None

    def to(self, device: torch.device | str) -> UserBlock:
        """Return the same block with its tensors on ``device``."""
        seen = self.seen and (self.seen[0].to(device), self.seen[1].to(device))
        return UserBlock(
            self.items.to(device), self.packing.to(device), self.targets.to(device), seen
        )


class UserBlocks:
    """All held-out users in the order of the arrays, ``USERS_AT_ONCE`` at a time, on the CPU.

    Args:
        sequences: The arrays, as ``check_sequences`` describes them.
        filter_seen: Whether the blocks carry the items to leave out of the ranking.

    Raises:
        ValueError: The arrays are malformed.
    """

    def __init__(self, sequences: Mapping[str, np.ndarray], filter_seen: bool) -> None:
        check_sequences(sequences)
        self.sequences = sequences
        self.filter_seen = filter_seen
        self.starts = range(0, len(sequences["users"]), USERS_AT_ONCE)

    def __len__(self) -> int:
        """Number of blocks."""
        return len(self.starts)

    def __iter__(self) -> Iterator[UserBlock]:
        """Yield the blocks."""
        max_length = int(self.sequences["max_length"][0])
        for start in self.starts:
            bounds = self.sequences["offsets"][start : start + USERS_AT_ONCE + 1]
            history = _int64(self.sequences["items"][bounds[0] : bounds[-1]])
            offsets = _int64(bounds - bounds[0])
            lengths = offsets.diff()
            items_left = torch.repeat_interleave(offsets[1:], lengths) - torch.arange(len(history))
            yield UserBlock(
                history[items_left <= max_length],
                Packing.from_lengths(lengths.clamp(max=max_length)),
                _int64(self.sequences["targets"][start : start + USERS_AT_ONCE]),
                (history, offsets) if self.filter_seen else None,
            )


def check_sequences(sequences: Mapping[str, np.ndarray]) -> None:
    """Check that the arrays of held-out users fit together.

    Args:
        sequences: ``users`` [n], ``items`` [rows] with ``offsets`` [n + 1] (the history of user
            ``users[i]`` is ``items[offsets[i]:offsets[i + 1]]``), ``targets`` [n], ``n_items`` [1],
            ``max_length`` [1], the longest history that the model reads.

    Raises:
        ValueError: There is no user or one comes twice, lengths disagree, a history is empty, or an
            id lies outside the catalogue.
    """
    users, items, offsets = sequences["users"], sequences["items"], sequences["offsets"]
    n_items = int(sequences["n_items"][0])
    if len(users) == 0:
        raise ValueError("there is no held-out user; move the split or lower the filters")
    if len(sequences["targets"]) != len(users):
        raise ValueError(
            f"targets must hold one item for each of {len(users)} users, "
            f"got {len(sequences['targets'])}"
        )
    if len(offsets) != len(users) + 1:
        raise ValueError(
            f"offsets must hold {len(users) + 1} places for {len(users)} users, got {len(offsets)}"
        )
    if offsets[0] != 0 or offsets[-1] != len(items):
        raise ValueError(
            f"offsets must run from 0 to {len(items)}, the number of items, "
            f"got {offsets[0]} to {offsets[-1]}"
        )
    if (empty := np.flatnonzero(np.diff(offsets) < 1)).size:
        raise ValueError(
            "offsets must increase by at least 1, since every history holds an item; "
            f"user {users[empty[0]]} goes from {offsets[empty[0]]} to {offsets[empty[0] + 1]}"
        )
    distinct, counts = np.unique(users, return_counts=True)
    if (repeated := distinct[counts > 1]).size:
        raise ValueError(f"users must be distinct, but user {repeated[0]} comes more than once")
    for name in ("items", "targets"):
        check_items(name, sequences[name], 0, n_items)


def check_items(name: str, items: np.ndarray, lowest: int, n_items: int) -> None:
    """Check that the item ids of the array called ``name`` lie in ``lowest``..``n_items - 1``.

    Raises:
        ValueError: One does not.
    """
    if items.size and not (items.min() >= lowest and items.max() < n_items):
        raise ValueError(
            f"{name} must lie in {lowest}..{n_items - 1}, got {items.min()}..{items.max()}"
        )


def _int64(array: np.ndarray) -> Tensor:
    """Copy to a tensor of int64."""
    return torch.from_numpy(array.astype(np.int64))
