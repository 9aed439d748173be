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
from sce_pipeline.training.item_table import ItemTable
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
        table: The model's item table.
        ranks: The processes that share the users or, each ranking all users, the item table.
    """

    def __init__(
        self,
        model: Backbone,
        sequences: Mapping[str, np.ndarray],
        filter_seen: bool,
        table: ItemTable,
        ranks: Ranks,
    ) -> None:
        self.model = model
        self.table = table
        self.ranks = ranks
        self.users = UserBlocks(sequences, filter_seen).to(ranks.device)
        self.shares_users = table.shard is None
        first, step = (ranks.rank, ranks.world) if self.shares_users else (0, 1)
        self.blocks = range(first, len(self.users), step)
        self.n_users = len(sequences["users"])

    def measure(self) -> dict[str, float]:
        """Return the mean NDCG and hit rate over all users."""
        self.model.eval()
        ranks = self._target_ranks()
        sums = torch.stack([ndcg(ranks, CUTOFF).sum(), hit_rate(ranks, CUTOFF).sum()])
        sums = sums.double().to(self.ranks.device)
        if self.shares_users:
            self.ranks.add(sums)
        value, hits = (sums / self.n_users).tolist()
        return {MONITOR: value, f"hr@{CUTOFF}": hits}

    @torch.inference_mode()
    def _target_ranks(self) -> Tensor:
        """Rank the targets of this process's users, int64 [users] on the CPU."""
        rankings = []
        for block in map(self.users.block, self.blocks):
            hidden = self.model.encode_last(self.table.embed(block.items), block.packing)
            arguments = hidden, self.table.weight, block.targets, block.seen
            rankings.append(rank_block(*arguments, k=0, shard=self.table.shard))
        if not rankings:  # more processes than blocks of users
            return torch.empty(0, dtype=torch.int64)
        return join_rankings(rankings).target_ranks
