"""What the losses over sampled negatives share: the draw and the logits."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from sce_pipeline.losses.base import (
    Histories,
    Loss,
    at_least_float32,
    autocast_dtype,
    chunks,
    target_logits,
)
from sce_pipeline.losses.grouped import Groups
from sce_pipeline.losses.implementation import Implementation, takes_triton
from sce_pipeline.losses.negatives import Exclude, Negatives, Shared, draw_groups, draw_negatives
from sce_pipeline.losses.sampling import Draw, draw


class SampledLoss(Loss):
    """A loss that contrasts each target with negatives drawn uniformly from the catalogue.

    A token with no valid negative, such as that of a user who has every item, has nothing to be
    contrasted with: only its target enters the loss.

    Args:
        n_negatives: Negatives of each token.
        shared: Who shares a draw of negatives: ``token`` (each has its own), ``sequence`` or
            ``batch``. The more share, the less memory traffic and the more alike the negatives.
        exclude: What is no negative: the items of the user's ``history``, past and future, or only
            the token's ``target``.
        impl: Which implementation computes; see ``losses.implementation``. There are Triton kernels
            for all draws per sequence and, excluding the target, for those per token and per batch.
    """

    def __init__(
        self, *, n_negatives: int, shared: Shared, exclude: Exclude, impl: Implementation = "auto"
    ) -> None:
        super().__init__()
        self.n_negatives = n_negatives
        self.shared = shared
        self.exclude = exclude
        self.impl = impl
        # A draw per sequence excluding targets reads only how many sequences there are.
        self.needs_histories = exclude == "history" or shared == "sequence"

    def _mean_loss(
        self,
        hidden: Tensor,
        item_embeddings: Tensor,
        targets: Tensor,
        sequence: Tensor,
        histories: Histories,
    ) -> Tensor:
        n_items = len(item_embeddings)
        if self.n_negatives >= n_items:
            self._warn_once(
                "n_negatives = %d is as large as the catalogue of %d items or larger: "
                "negatives are drawn with replacement and repeat themselves",
                self.n_negatives,
                n_items,
            )
        if not self._takes_triton(hidden, item_embeddings):
            negatives = draw_negatives(
                targets,
                sequence,
                histories,
                n_items=n_items,
                n_negatives=self.n_negatives,
                shared=self.shared,
                exclude=self.exclude,
            )
            return self.contrast(hidden, item_embeddings, targets, sequence, negatives)
        if self.shared == "token":
            drawn = draw(len(hidden), n_items, self.n_negatives, hidden.device, with_coins=False)
            return self._mean_in_triton(hidden, item_embeddings, targets, drawn)
        groups = draw_groups(
            targets,
            sequence,
            histories,
            n_items=n_items,
            n_negatives=self.n_negatives,
            shared=self.shared,
            exclude=self.exclude,
        )
        return self._mean_of_groups(hidden, item_embeddings, targets, groups)

    def contrast(
        self,
        hidden: Tensor,
        item_embeddings: Tensor,
        targets: Tensor,
        sequence: Tensor,
        negatives: Negatives,
    ) -> Tensor:
        """Return the mean loss over tokens, given the negatives."""
        logits = negative_logits(
            hidden, item_embeddings, negatives.items, sequence, shared=self.shared
        )
        return self._mean_of_logits(
            target_logits(hidden, item_embeddings, targets),
            at_least_float32(logits).masked_fill(negatives.rejected, -torch.inf),
            negatives,
            n_items=len(item_embeddings),
        )

    def _takes_triton(self, hidden: Tensor, item_embeddings: Tensor) -> bool:
        if self.exclude == "target" or self.shared == "sequence":
            # The gradient of the table is gathered in order for draws per token alone.
            deterministic = self.shared == "token"
            return takes_triton(self.impl, hidden, item_embeddings, deterministic=deterministic)
        if self.impl == "triton":
            raise ValueError(
                "impl is triton, whose kernels need exclude: target or shared: sequence, "
                f"got shared: {self.shared} and exclude: {self.exclude}; use impl: torch or auto"
            )
        return False

    @abstractmethod
    def _mean_in_triton(
        self, hidden: Tensor, item_embeddings: Tensor, targets: Tensor, drawn: Draw
    ) -> Tensor:
        """Return the mean loss over tokens, given the draws of each, through Triton kernels."""

    @abstractmethod
    def _mean_of_groups(
        self, hidden: Tensor, item_embeddings: Tensor, targets: Tensor, groups: Groups
    ) -> Tensor:
        """Return the mean loss over tokens, given draws that are shared, likewise."""

    @abstractmethod
    def _mean_of_logits(
        self, positive: Tensor, negative: Tensor, negatives: Negatives, n_items: int
    ) -> Tensor:
        """Return the mean loss over tokens, given the logits.

        Args:
            positive: The targets' logits, [tokens].
            negative: The negatives' logits, [tokens, n_negatives], -inf where rejected.
            negatives: The negatives.
            n_items: Size of the catalogue.
        """


def negative_logits(
    hidden: Tensor, item_embeddings: Tensor, items: Tensor, sequence: Tensor, shared: Shared
) -> Tensor:
    """Return the logits of each token's negatives, [tokens, n_negatives].

    The embeddings [tokens, n_negatives, d] never stand whole. A draw per batch is one matrix
    product. A draw per sequence is cut into tiles of as many rows as the average sequence has
    tokens, each sequence starting a tile of its own, so that there are at most twice as many tiles
    as sequences, however ragged these are, and nobody has to ask the device for the longest.

    Args:
        hidden: [tokens, d].
        item_embeddings: [n_items, d].
        items: The negatives, int64 [groups, n_negatives].
        sequence: int64 [tokens].
        shared: What the groups are.
    """
    if shared == "batch":
        return hidden @ functional.embedding(items[0], item_embeddings).T
    dtype = autocast_dtype(hidden.device)
    if dtype is None or hidden.dtype == torch.float64:
        dtype = hidden.dtype
    if shared == "token":
        return _GatheredLogits.apply(hidden[:, None], item_embeddings, items, dtype)[:, 0]

    n_tokens, n_sequences = len(hidden), len(items)
    n_rows = -(-n_tokens // n_sequences)
    n_tiles = n_tokens // n_rows + n_sequences
    every_sequence = torch.arange(n_sequences + 1, device=hidden.device)
    first_token = torch.searchsorted(sequence, every_sequence)
    last_tile = ((first_token.diff() + n_rows - 1) // n_rows).cumsum(0)
    first_tile = torch.cat([last_tile.new_zeros(1), last_tile[:-1]])
    position = torch.arange(n_tokens, device=hidden.device) - first_token[sequence]
    row = first_tile[sequence] * n_rows + position
    tiles = hidden.new_zeros(n_tiles * n_rows, hidden.shape[1]).index_copy(0, row, hidden)
    # Tiles that no sequence needs go to the last one; none of their rows is read.
    every_tile = torch.arange(n_tiles, device=hidden.device)
    owner = torch.searchsorted(last_tile, every_tile, right=True).clamp_(max=n_sequences - 1)
    logits = _GatheredLogits.apply(
        tiles.view(n_tiles, n_rows, -1), item_embeddings, items[owner], dtype
    )
    return logits.flatten(0, 1).index_select(0, row)


class _GatheredLogits(torch.autograd.Function):
    """``queries @ item_embeddings[items].mT``, chunk by chunk, gathering anew in the backward.

    queries [n, rows, d], item_embeddings [n_items, d] and items [n, keys] give logits
    [n, rows, keys] in ``dtype``. The gradient of the table is summed in float32 at least.
    """

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, item_embeddings: Tensor, items: Tensor, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(queries, item_embeddings, items)
        ctx.dtype = dtype
        logits = queries.new_empty(*queries.shape[:2], items.shape[1], dtype=dtype)
        for chunk in _gather_chunks(queries, items):
            keys = functional.embedding(items[chunk], item_embeddings).to(dtype)
            torch.bmm(queries[chunk].to(dtype), keys.mT, out=logits[chunk])
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        queries, item_embeddings, items = ctx.saved_tensors
        grad_queries = torch.empty_like(queries)
        table_dtype = torch.promote_types(item_embeddings.dtype, torch.float32)
        grad_table = torch.zeros_like(item_embeddings, dtype=table_dtype)
        for chunk in _gather_chunks(queries, items):
            keys = functional.embedding(items[chunk], item_embeddings).to(ctx.dtype)
            grad_queries[chunk] = grad[chunk] @ keys
            grad_keys = grad[chunk].mT @ queries[chunk].to(ctx.dtype)
            grad_table.index_add_(
                0, items[chunk].flatten(), grad_keys.flatten(0, 1).to(table_dtype)
            )
        return grad_queries, grad_table.to(item_embeddings.dtype), None, None


def _gather_chunks(queries: Tensor, items: Tensor) -> Iterator[slice]:
    n_tiles, n_rows, d = queries.shape
    return chunks(n_tiles, max(n_rows, items.shape[1]) * d, queries.device)
