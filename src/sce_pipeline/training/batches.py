"""Shuffled, packed batches of training windows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sce_pipeline.evaluation.held_out import check_items
from sce_pipeline.losses.base import Histories
from sce_pipeline.models import Packing


@dataclass(frozen=True)
class TrainingBatch:
    """Some windows, packed: from each item but a window's last the next one is to be predicted.

    Attributes:
        items: Inputs, int64 [tokens].
        targets: The item after each input, int64 [tokens].
        packing: Which window each token belongs to.
        histories: The items of each window's user, where the loss asks for them.
    """

    items: Tensor
    targets: Tensor
    packing: Packing
    histories: Histories | None

    def to(self, device: torch.device | str) -> TrainingBatch:
        """Return the same batch with its tensors on ``device``."""
        histories = self.histories
        return TrainingBatch(
            self.items.to(device),
            self.targets.to(device),
            self.packing.to(device),
            histories and Histories(*(part.to(device) for part in histories)),
        )


class TrainingBatches:
    """One epoch of batches for each iteration, every window once, in an order drawn anew.

    Args:
        sequences: The arrays of ``train_sequences``.
        batch_size: Windows in a batch; the last batch of an epoch holds what is left.
        seed: Seed of the order.
        with_histories: Whether batches carry the items of their users.

    Raises:
        ValueError: There is no window to train on, or an item id lies outside the catalogue.
    """

    def __init__(
        self,
        sequences: Mapping[str, np.ndarray],
        batch_size: int,
        seed: int,
        with_histories: bool,
    ) -> None:
        self.items = torch.from_numpy(sequences["items"])
        self.starts = torch.from_numpy(sequences["window_starts"])
        self.stops = torch.from_numpy(sequences["window_stops"])
        self.batch_size = batch_size
        self.generator = torch.Generator().manual_seed(seed)
        n_items = int(sequences["n_items"][0])
        if self.starts.numel() == 0:
            raise ValueError(
                "no user has two training items, so there is nothing to learn from; "
                "lower the filters or move the split"
            )
        check_items("training items", sequences["items"], 0, n_items)
        self.histories: Histories | None = None
        if with_histories:
            offsets = torch.from_numpy(sequences["offsets"])
            self.histories = _distinct_items(self.items, offsets, n_items)
            self.users = torch.searchsorted(offsets, self.starts, right=True) - 1

    @property
    def n_tokens(self) -> int:
        """Tokens in an epoch."""
        return int((self.stops - self.starts - 1).sum())

    def __len__(self) -> int:
        """Batches in an epoch."""
        return math.ceil(self.starts.numel() / self.batch_size)

    def __iter__(self) -> Iterator[TrainingBatch]:
        """Draw an order and yield the epoch's batches."""
        order = torch.randperm(self.starts.numel(), generator=self.generator)
        for windows in order.split(self.batch_size):
            yield self._batch(windows)

    def _batch(self, windows: Tensor) -> TrainingBatch:
        starts = self.starts[windows]
        packing = Packing.from_lengths(self.stops[windows] - starts - 1)
        inputs = starts[packing.sequence] + packing.place
        histories = None
        if self.histories is not None:
            histories = _select(self.histories, self.users[windows])
        return TrainingBatch(
            self.items[inputs].long(), self.items[inputs + 1].long(), packing, histories
        )


def _distinct_items(items: Tensor, offsets: Tensor, n_items: int) -> Histories:
    """Sort each user's items and drop repeats, for all users at once."""
    user = torch.repeat_interleave(offsets.diff())
    keys = torch.unique(user * n_items + items)
    counts = torch.bincount(keys // n_items, minlength=offsets.numel() - 1)
    return Histories(keys % n_items, torch.nn.functional.pad(counts.cumsum(0), (1, 0)))


def _select(histories: Histories, users: Tensor) -> Histories:
    """Take some users' items out, in the order of ``users``."""
    packing = Packing.from_lengths(histories.offsets.diff()[users])
    flat = histories.offsets[users][packing.sequence] + packing.place
    offsets = torch.nn.functional.pad(packing.lengths.cumsum(0), (1, 0))
    return Histories(histories.items[flat], offsets)
