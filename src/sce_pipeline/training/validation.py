"""Validation after every epoch, and the record of all epochs."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from sce_pipeline.evaluation.held_out import UserBlock, UserBlocks
from sce_pipeline.evaluation.metrics import hit_rate, ndcg
from sce_pipeline.evaluation.ranking import join_rankings, rank_block
from sce_pipeline.models import SASRec

logger = logging.getLogger(__name__)

CUTOFF = 10
MONITOR = f"ndcg@{CUTOFF}"
"""The validation metric that picks the best weights and stops training."""


class Validation(Callback):
    """Ranks the whole catalogue for the validation users after each epoch, as evaluation does.

    Logs ``ndcg@10`` for early stopping and the choice of the best weights, and keeps for each epoch
    its loss, metrics, seconds of training and validation, and tokens per second.

    Args:
        model: The backbone in training.
        sequences: The arrays of ``validation_sequences``.
        filter_seen: Whether to leave out the items of a user's history.
        n_tokens: Training tokens in an epoch.
    """

    def __init__(
        self,
        model: SASRec,
        sequences: Mapping[str, np.ndarray],
        filter_seen: bool,
        n_tokens: int,
    ) -> None:
        self.model = model
        self.users = UserBlocks(sequences, filter_seen)
        self.blocks: list[UserBlock] = []
        self.n_tokens = n_tokens
        self.epochs: list[dict[str, Any]] = []
        self._started = 0.0

    @property
    def best(self) -> dict[str, Any]:
        """The epoch with the highest NDCG, the earliest of equals."""
        return max(self.epochs, key=lambda epoch: epoch[MONITOR])

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring the validation users to the device, once."""
        self.blocks = list(self.users.to(pl_module.device))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the epoch's clock."""
        self._started = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate, record the epoch and log it in one line."""
        loss = float(trainer.callback_metrics["loss"])  # waits for the device
        trained = time.perf_counter()
        if not math.isfinite(loss):
            raise ValueError(
                f"the training loss is {loss} in epoch {trainer.current_epoch + 1}: "
                "lower training.learning_rate or set training.precision to 32-true"
            )
        pl_module.eval()
        ranks = self._target_ranks()
        pl_module.train()
        value = float(ndcg(ranks, CUTOFF).mean().float())  # as Lightning compares it
        pl_module.log(MONITOR, value)
        validated = time.perf_counter()
        training_seconds = trained - self._started
        self.epochs.append(
            {
                "epoch": trainer.current_epoch + 1,
                "loss": loss,
                MONITOR: value,
                f"hr@{CUTOFF}": float(hit_rate(ranks, CUTOFF).mean()),
                "training_seconds": training_seconds,
                "validation_seconds": validated - trained,
                "tokens_per_second": self.n_tokens / training_seconds,
            }
        )
        logger.info(
            "epoch %d  loss %.4f  validation %s %.4f (best %.4f in epoch %d)  %.2f s",
            trainer.current_epoch + 1,
            loss,
            MONITOR.upper(),
            value,
            self.best[MONITOR],
            self.best["epoch"],
            validated - self._started,
        )

    @torch.inference_mode()
    def _target_ranks(self) -> Tensor:
        """Rank every validation user's target, int64 [users] on the CPU."""
        rankings = []
        for block in self.blocks:
            hidden = self.model.encode_last(block.items, block.packing)
            table = self.model.item_embeddings
            rankings.append(rank_block(hidden, table, block.targets, block.seen, k=0))
        return join_rankings(rankings).target_ranks
