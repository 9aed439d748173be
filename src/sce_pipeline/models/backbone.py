"""What all backbones share: an item table, and packed embeddings in, hidden states out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from sce_pipeline.models.packing import Packing


class Backbone(nn.Module, ABC):
    """Maps packed histories to hidden states; knows no losses.

    The lookup in the item table and the rest are separate steps, ``embed`` and ``encode``: the
    table may be shared out over several devices, and its gradient, as large as itself, is
    made by the loss.

    Args:
        n_items: Size of the catalogue; items are 0 to n_items - 1.
        max_length: Longest history, in items.
        hidden_size: Size d of embeddings and hidden states.

    Attributes:
        max_length: Longest history, in items.
        objective: What a backbone is trained for: ``next``, to predict from every item the one
            after it, or ``masked``, to find the items in whose place ``encode`` is told to see a
            mask.
        has_static_shapes: Whether ``encode`` launches the same kernels for all packings of as many
            tokens, so that they can be replayed as a CUDA graph.
    """

    objective: ClassVar[Literal["next", "masked"]] = "next"
    has_static_shapes = True

    def __init__(self, n_items: int, max_length: int, hidden_size: int) -> None:
        super().__init__()
        self.max_length = max_length
        self.item_embedding = nn.Embedding(n_items, hidden_size)

    @property
    def item_embeddings(self) -> Tensor:
        """The live item table [n_items, d]: input embeddings and output classifier in one."""
        return self.item_embedding.weight

    def forward(self, items: Tensor, packing: Packing) -> Tensor:
        """Map packed item ids, int64 [tokens], to hidden states [tokens, d].

        Raises:
            ValueError: A sequence is longer than ``max_length``.
        """
        return self.encode(self.embed(items), packing)

    def embed(self, items: Tensor) -> Tensor:
        """Look item ids, int64 [tokens], up in the table: [tokens, d]."""
        return self.item_embedding(items)

    @abstractmethod
    def encode(self, embedded: Tensor, packing: Packing) -> Tensor:
        """Map packed item embeddings [tokens, d] to hidden states [tokens, d].

        Raises:
            ValueError: A sequence is longer than ``max_length``.
        """

    def encode_last(self, embedded: Tensor, packing: Packing) -> Tensor:
        """Map packed embeddings of histories to the states that predict what follows each.

        Args:
            embedded: [tokens, d].
            packing: Histories of at least one and at most ``max_length`` items.

        Returns:
            [sequences, d].
        """
        return packing.last(self.encode(embedded, packing))

    def _check_length(self, packing: Packing) -> None:
        if packing.longest > self.max_length:
            raise ValueError(
                f"a sequence of {packing.longest} items is longer than "
                f"max_length = {self.max_length}"
            )

    def _position_from_end(self, packing: Packing) -> Tensor:
        """Number the places so that the most recent item is at ``max_length - 1``, [tokens]."""
        return self.max_length - packing.lengths[packing.sequence] + packing.place


def xavier_initialize(module: nn.Module) -> None:
    """Draw all matrices from Xavier's uniform distribution (Glorot & Bengio, 2010)."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
