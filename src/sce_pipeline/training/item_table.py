"""The item table as training sees it: looked up here, given its gradient there, ranked with."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, distributed

from sce_pipeline.collectives import gather_rows
from sce_pipeline.evaluation.ranking import Shard
from sce_pipeline.losses import Loss
from sce_pipeline.losses.cce import CCE
from sce_pipeline.losses.sharded import sharded_cross_entropy
from sce_pipeline.models.item_shards import add_gradient, item_range, lookup
from sce_pipeline.training.batches import TrainingBatch
from sce_pipeline.training.ranks import Ranks

ITEM_TABLE = "item_embedding.weight"
"""Name of the item table among a backbone's weights."""


class ItemTable:
    """The whole table on every rank.

    The lookup's gradient is added to the one that the loss made, in place: as a gradient of its own
    it would take as much memory again, and longer than the lookup. On a GPU the sums of items that
    occur more than once come in any order, unless PyTorch is told to be deterministic.

    Args:
        weight: The item embeddings, [n_items, d].
        ranks: The processes that train together.

    Attributes:
        shard: Which rows these are, where the ranks share the table.
    """

    def __init__(self, weight: Tensor, ranks: Ranks) -> None:
        self.weight = weight
        self.ranks = ranks
        self.shard: Shard | None = None
        self._sum: distributed.Work | None = None

    @property
    def gradient(self) -> Tensor:
        """The table's gradient, which the loss makes."""
        assert self.weight.grad is not None  # noqa: S101
        return self.weight.grad

    def lookup(self, batch: TrainingBatch) -> Tensor:
        """Return the embeddings of the batch's items, [slots, d], without a graph."""
        return self.weight.detach().index_select(0, batch.items)

    def start_sum(self) -> None:
        """Begin to add up the ranks' gradients, while the backbone derives."""
        if self.ranks.world > 1:
            self._sum = distributed.all_reduce(self.gradient, async_op=True)

    def add_gradient(self, batch: TrainingBatch, gradient: Tensor) -> None:
        """Add the derivative by what ``lookup`` returned, [slots, d]; to the sum, of all ranks."""
        items = batch.items
        if self._sum is not None:
            items = gather_rows(items, batch.slot_counts)
            gradient = gather_rows(gradient, batch.slot_counts)
            self._sum.wait()
            self._sum = None
        self.gradient.index_add_(0, items, gradient)

    def loss(self, loss: Loss, states: Tensor, batch: TrainingBatch) -> Tensor:
        """Return this rank's addend of a step's mean loss over its tokens."""
        mean = loss(states, self.weight, batch.targets, batch.sequence, batch.histories)
        own = batch.counts[self.ranks.rank]
        return mean if own == batch.step_tokens else mean * (own / batch.step_tokens)

    def gradient_norm(self) -> Tensor:
        """Return the norm of the whole table's gradient."""
        return torch.linalg.vector_norm(self.gradient)

    def embed(self, items: Tensor) -> Tensor:
        """Look up items that are the same on all ranks, int64 [tokens]: [tokens, d]."""
        return self.weight.detach().index_select(0, items)

    def divide(self, values: Mapping[Any, Any], key: Any) -> tuple[dict[Any, Any], dict[Any, Any]]:
        """Divide ``values`` into what all ranks hold alike and what each has of its own.

        Args:
            values: Something of each weight, by its name or number.
            key: The item table's.
        """
        return dict(values), {}


class ShardedItemTable(ItemTable):
    """As many rows of the table on each rank; with exact cross-entropy over all of them.

    Args:
        weight: This rank's rows, those of its ``item_range``, [rows, d].
        ranks: The processes that share the table.
        n_items: Items of all ranks together.
    """

    def __init__(self, weight: Tensor, ranks: Ranks, n_items: int) -> None:
        super().__init__(weight, ranks)
        self.n_items = n_items
        self.items = item_range(n_items, ranks.rank, ranks.world)
        group = distributed.group.WORLD
        assert group is not None  # noqa: S101
        self.shard = Shard.in_order_of_ranks(len(weight), group)

    def lookup(self, batch: TrainingBatch) -> Tensor:
        """Return the embeddings of the batch's items, [slots, d], without a graph."""
        return self._lookup(batch.items, batch.slot_counts)

    def start_sum(self) -> None:
        """Do nothing: each row's gradient is made where the row is."""

    def add_gradient(self, batch: TrainingBatch, gradient: Tensor) -> None:
        """Add the derivative by what ``lookup`` returned, [slots, d], on the ranks that hold it."""
        first, counts = self.items.start, batch.slot_counts
        add_gradient(self.gradient, batch.items, gradient, first_item=first, counts=counts)

    def loss(self, loss: Loss, states: Tensor, batch: TrainingBatch) -> Tensor:
        """Return the share of a step's mean loss that all ranks' tokens of this part have.

        It is the same on all ranks and divided by their number, so that a sum over them is right;
        its gradients are whole.
        """
        assert isinstance(loss, CCE)  # noqa: S101 - the parameters allow no other
        offset = loss.log_probability
        mean = sharded_cross_entropy(
            states,
            self.weight,
            batch.targets,
            first_item=self.items.start,
            n_items=self.n_items,
            counts=batch.counts,
            log_probability=None if offset is None else offset[self.items.start : self.items.stop],
            label_smoothing=loss.label_smoothing,
            z_loss=loss.z_loss,
            logit_scale=loss.logit_scale,
            skip_mass=loss.skip_mass,
            impl=loss.impl,
        )
        share = mean * (sum(batch.counts) / batch.step_tokens)
        return share + (1 / self.ranks.world - 1) * share.detach()

    def gradient_norm(self) -> Tensor:
        """Return the norm of the whole table's gradient, of which each rank has its rows'."""
        squares = torch.linalg.vector_norm(self.gradient).square()
        self.ranks.add(squares)
        return squares.sqrt()

    def embed(self, items: Tensor) -> Tensor:
        """Look up items that are the same on all ranks, int64 [tokens]: [tokens, d]."""
        bounds = [len(items) * rank // self.ranks.world for rank in range(self.ranks.world + 1)]
        counts = [last - first for first, last in pairwise(bounds)]
        own = items.split(counts)[self.ranks.rank]
        return gather_rows(self._lookup(own, counts), counts)

    def divide(self, values: Mapping[Any, Any], key: Any) -> tuple[dict[Any, Any], dict[Any, Any]]:
        """Divide ``values`` into what all ranks hold alike and what each has of its own."""
        own = {name: value for name, value in values.items() if name == key}
        return {name: value for name, value in values.items() if name != key}, own

    def _lookup(self, items: Tensor, counts: list[int]) -> Tensor:
        first = self.items.start
        weight = self.weight.detach()
        return lookup(weight, items, first_item=first, n_items=self.n_items, counts=counts)
