"""The Lightning module: a backbone trained with a loss over the catalogue."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from sce_pipeline.losses import build_loss
from sce_pipeline.models import Backbone
from sce_pipeline.parameters import TrainingParameters
from sce_pipeline.training.batches import TrainingBatch


class NextItemModule(LightningModule):
    """Trains ``model`` to predict each next item; logs ``loss``, the mean over tokens."""

    def __init__(self, model: Backbone, parameters: TrainingParameters) -> None:
        super().__init__()
        self.model = model
        self.loss = build_loss(parameters.loss)
        self.learning_rate = parameters.learning_rate
        self.betas = parameters.betas

    def training_step(self, batch: TrainingBatch) -> Tensor:
        """Return the mean loss over the batch's tokens."""
        hidden = self.model(batch.items, batch.packing)
        loss = self.loss(
            hidden,
            self.model.item_embeddings,
            batch.targets,
            batch.packing.sequence,
            batch.histories,
        )
        self.log("loss", loss, on_step=False, on_epoch=True, batch_size=batch.targets.numel())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam over all weights."""
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate, betas=self.betas)
