"""Held-out users: the arrays of their histories and targets, and packed blocks of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sce_pipeline.models import Packing

USERS_AT_ONCE = 4096
"""Most users in a block."""

TOKENS_AT_ONCE = 2**15
"""Most tokens in a block of more than one user: 8 MiB for each tensor of 64 floats a token. On
a CPU the padding counts, over which attention spreads them there."""


@dataclass(frozen=True)
class UserBlock:
    """Some held-out users.

    Attributes:
        items: The last items of each user's history, at most as many as the model reads, end to
            end, int64 [tokens].
        packing: Which user each of them belongs to.
        targets: The item that follows each history, int64 [users].
        seen: Where seen items are left out of the ranking, the whole histories: items int64 [total]
            and offsets int64 [users + 1] into them, which stay on the CPU.
    """

    items: Tensor
    packing: Packing
    targets: Tensor
    seen: tuple[Tensor, Tensor] | None


class UserBlocks:
    """All held-out users in the order of the arrays, in few large blocks.

    The users are held as a whole, and where a block ends is known on the CPU: cutting the blocks
    out moves no histories and does not wait for a device.

    Args:
        sequences: The arrays, as ``check_sequences`` describes them.
        filter_seen: Whether the blocks carry the items to leave out of the ranking.
        tokens_at_once: Most tokens in a block of more than one user; ``TOKENS_AT_ONCE`` if not
            given.

    Raises:
        ValueError: The arrays are malformed.
    """

    def __init__(
        self,
        sequences: Mapping[str, np.ndarray],
        filter_seen: bool,
        tokens_at_once: int | None = None,
    ) -> None:
        check_sequences(sequences)
        self.items = torch.tensor(sequences["items"], dtype=torch.int32)
        self.targets = torch.tensor(sequences["targets"], dtype=torch.int64)
        self.offsets = torch.tensor(sequences["offsets"], dtype=torch.int64)  # stay on the CPU
        self.stops = self.offsets[1:]
        self.lengths = self.offsets.diff().clamp(max=int(sequences["max_length"][0]))
        self.tokens_at_once = TOKENS_AT_ONCE if tokens_at_once is None else tokens_at_once
        self.cuts = _cuts(self.lengths.numpy(), self.items.device, self.tokens_at_once)
        self.filter_seen = filter_seen

    def to(self, device: torch.device | str) -> UserBlocks:
        """Return blocks of the same users, to be cut out on ``device``, as large as suits it."""
        moved = copy.copy(self)
        moved.items = self.items.to(device)
        moved.targets = self.targets.to(device)
        moved.stops = self.stops.to(device)
        moved.cuts = _cuts(self.lengths.numpy(), moved.items.device, self.tokens_at_once)
        return moved

    def __len__(self) -> int:
        """Number of blocks."""
        return len(self.cuts) - 1

    def __iter__(self) -> Iterator[UserBlock]:
        """Cut the blocks out, one at a time."""
        for number in range(len(self)):
            yield self.block(number)

    def block(self, number: int) -> UserBlock:
        """Cut one of the blocks out, counted from 0."""
        start, stop = self.cuts[number : number + 2]
        packing = Packing.from_lengths(self.lengths[start:stop], self.items.device)
        firsts = self.stops[start:stop] - packing.lengths
        seen = None
        if self.filter_seen:
            offsets = self.offsets[start : stop + 1]
            first, last = offsets[[0, -1]].tolist()
            seen = (self.items[first:last].long(), offsets - first)
        return UserBlock(
            self.items[firsts[packing.sequence] + packing.place].long(),
            packing,
            self.targets[start:stop],
            seen,
        )


def _cuts(lengths: np.ndarray, device: torch.device, tokens_at_once: int) -> list[int]:
    """Return where blocks of users whose histories have these lengths start, and the end."""
    cuts = [0]
    while cuts[-1] < len(lengths):
        block = lengths[cuts[-1] : cuts[-1] + USERS_AT_ONCE]
        tokens = block.cumsum()
        if device.type == "cpu":
            tokens = np.maximum.accumulate(block) * np.arange(1, len(block) + 1)
        cuts.append(cuts[-1] + max(1, int(np.searchsorted(tokens, tokens_at_once, "right"))))
    return cuts


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
