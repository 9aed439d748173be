"""The item table as training sees it: looked up here, given its gradient there."""

from __future__ import annotations

from torch import Tensor

from sce_pipeline.training.batches import TrainingBatch


class ItemTable:
    """The whole table on every device.

    The lookup's gradient is added to the one that the loss made, in place: as a gradient of its own
    it would take as much memory again, and longer than the lookup. On a GPU the sums of items that
    occur more than once come in any order, unless PyTorch is told to be deterministic.

    Args:
        weight: The item embeddings, [n_items, d].
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def lookup(self, batch: TrainingBatch) -> Tensor:
        """Return the embeddings of the batch's items, [slots, d], without a graph."""
        return self.weight.detach().index_select(0, batch.items)

    def add_gradient(self, batch: TrainingBatch, gradient: Tensor) -> None:
        """Add the derivative by what ``lookup`` returned, [slots, d]."""
        assert self.weight.grad is not None, "the loss derives by the table first"  # noqa: S101
        self.weight.grad.index_add_(0, batch.items, gradient)
