"""CCE⁻: CE⁻ whose negatives need no memory."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from sce_pipeline.losses.base import Histories, Loss
from sce_pipeline.losses.grouped import Groups, grouped_cross_entropy
from sce_pipeline.losses.implementation import Implementation, takes_triton
from sce_pipeline.losses.per_token import per_token_cross_entropy
from sce_pipeline.losses.sampling import COIN_BITS, Draw, Popularity, draw

TILE = 64
"""Tokens of a tile."""


class CCEMinus(Loss):
    """CCE⁻: cross-entropy over the target and sampled negatives (arXiv 2509.09682).

    Neither logits nor negatives are ever kept: both are made anew where they are needed. A draw
    that is a token's target is no negative of it.

    Args:
        n_negatives: Negatives of each token.
        shared: Who shares a draw of negatives: nobody (``token``), or the 64 tokens of a ``tile``.
        sampling: ``uniform``, or by ``popularity``, which needs ``use_item_counts``.
        log_correction: Whether negatives stand for all items but the target, or only for
            themselves.
        impl: Which implementation computes; see ``losses.implementation``.
    """

    def __init__(
        self,
        *,
        n_negatives: int,
        shared: Literal["token", "tile"],
        sampling: Literal["uniform", "popularity"],
        log_correction: bool,
        impl: Implementation = "auto",
    ) -> None:
        super().__init__()
        self.n_negatives = n_negatives
        self.shared = shared
        self.sampling = sampling
        self.log_correction = log_correction
        self.impl = impl
        self.needs_item_counts = sampling == "popularity"
        self.popularity: Popularity | None = None

    def use_item_counts(self, counts: Tensor) -> None:
        """Draw in proportion to the counts from now on."""
        self.popularity = Popularity(counts)

    def _mean_loss(
        self,
        hidden: Tensor,
        item_embeddings: Tensor,
        targets: Tensor,
        sequence: Tensor,
        histories: Histories,
    ) -> Tensor:
        drawn = self.draw_negatives(targets, len(item_embeddings))
        # The order in which the kernels add up the gradient of the table is open for tiles.
        deterministic = isinstance(drawn, Draw)
        triton = takes_triton(self.impl, hidden, item_embeddings, deterministic=deterministic)
        if isinstance(drawn, Groups):
            return grouped_cross_entropy(hidden, item_embeddings, targets, drawn, triton=triton)
        return per_token_cross_entropy(
            hidden,
            item_embeddings,
            targets,
            drawn,
            popularity=self.popularity,
            log_correction=self.log_correction,
            triton=triton,
        )

    def draw_negatives(self, targets: Tensor, n_items: int) -> Draw | Groups:
        """Draw the negatives of tokens, int64 [tokens], from a catalogue of ``n_items``.

        Raises:
            RuntimeError: Draws are by popularity, and ``use_item_counts`` was not called.
            ValueError: It was called for another catalogue.
        """
        self._check_popularity(n_items)
        if self.shared == "tile":
            return self._draw_tiles(targets, n_items)
        with_coins = self.popularity is not None
        return draw(len(targets), n_items, self.n_negatives, targets.device, with_coins=with_coins)

    def _check_popularity(self, n_items: int) -> None:
        if not self.needs_item_counts:
            return
        if self.popularity is None:
            raise RuntimeError(
                "cce_minus with sampling: popularity needs to know how often each item occurs; "
                "call use_item_counts first"
            )
        if self.popularity.n_items != n_items:
            raise ValueError(
                f"expected counts of {n_items} items, got those of {self.popularity.n_items}"
            )

    def _draw_tiles(self, targets: Tensor, n_items: int) -> Groups:
        """Draw the negatives of each tile; see ``per_token_cross_entropy`` for the correction."""
        n_tiles, device = -(-len(targets) // TILE), targets.device
        size = (n_tiles, self.n_negatives)
        items = torch.randint(n_items, size, device=device)
        if self.popularity is None:
            if not self.log_correction:
                return Groups(items, TILE)
            # In a catalogue of one item there are no others, and all draws are the target.
            return Groups(items, TILE, log_masses=math.log(max(n_items - 1, 1)))
        coins = torch.randint(2**COIN_BITS, size, dtype=torch.int32, device=device)
        items = self.popularity.choose(items, coins)
        if not self.log_correction:
            return Groups(items, TILE)
        return Groups(
            items,
            TILE,
            -self.popularity.log_chances[items],
            self.popularity.log_rests[targets],
        )
