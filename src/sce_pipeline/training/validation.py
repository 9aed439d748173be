"""Validation after every epoch, on the device."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from sce_pipeline.evaluation.held_out import UserBlocks
from sce_pipeline.evaluation.metrics import hit_rate, ndcg
from sce_pipeline.evaluation.ranking import join_rankings, rank_block
from sce_pipeline.models import Backbone
from sce_pipeline.training.ranks import Ranks

CUTOFF = 10
MONITOR = f"ndcg@{CUTOFF}"
"""The validation metric that picks the best weights and stops training."""


class Validation:
    """Ranks the whole catalogue for the validation users, as evaluation does, in float32.

    Args:
        model: The backbone in training.
        sequences: The arrays of ``validation_sequences``.
        filter_seen: Whether to leave out the items of a user's history.
        ranks: The processes that share the users.
    """

    def __init__(
        self,
        model: Backbone,
        sequences: Mapping[str, np.ndarray],
        filter_seen: bool,
        ranks: Ranks,
    ) -> None:
        self.model = model
        self.ranks = ranks
        users = UserBlocks(sequences, filter_seen).to(ranks.device)
        self.blocks = list(users)[ranks.rank :: ranks.world]
        self.n_users = len(sequences["users"])

    def measure(self) -> dict[str, float]:
        """Return the mean NDCG and hit rate over all users."""
        self.model.eval()
        ranks = self._target_ranks()
        sums = torch.stack([ndcg(ranks, CUTOFF).sum(), hit_rate(ranks, CUTOFF).sum()])
        sums = sums.double().to(self.ranks.device)
        self.ranks.add(sums)
        value, hits = (sums / self.n_users).tolist()
        return {MONITOR: value, f"hr@{CUTOFF}": hits}

    @torch.inference_mode()
    def _target_ranks(self) -> Tensor:
        """Rank the targets of this process's users, int64 [users] on the CPU."""
        rankings = []
        for block in self.blocks:
            hidden = self.model.encode_last(self.model.embed(block.items), block.packing)
            table = self.model.item_embeddings
            rankings.append(rank_block(hidden, table, block.targets, block.seen, k=0))
        if not rankings:  # more processes than blocks of users
            return torch.empty(0, dtype=torch.int64)
        return join_rankings(rankings).target_ranks
