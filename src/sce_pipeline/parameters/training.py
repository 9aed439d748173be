"""How a model is trained."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveFloat, PositiveInt, model_validator

from sce_pipeline.parameters.base import OpenFraction, Parameters, Seed
from sce_pipeline.parameters.losses import LossParameters
from sce_pipeline.parameters.models import ModelParameters


class TrainingParameters(Parameters):
    """How a model is trained.

    A step of the optimiser takes ``batch_size`` sequences, or as many as hold ``batch_tokens``
    tokens, shared out over ``devices`` and computed in ``accumulation_steps`` parts. ``patience``
    counts epochs without a better validation NDCG@10. ``item_table: sharded`` keeps a share of the
    item table on each device rather than all of it on every one.
    """

    seed: Seed
    model: ModelParameters
    loss: LossParameters
    batch_size: PositiveInt
    batch_tokens: PositiveInt | None
    accumulation_steps: PositiveInt
    learning_rate: PositiveFloat
    betas: tuple[OpenFraction, OpenFraction]
    max_epochs: PositiveInt
    patience: PositiveInt
    checkpoint_steps: PositiveInt
    accelerator: Literal["auto", "cpu", "gpu"]
    devices: PositiveInt
    item_table: Literal["replicated", "sharded"]
    precision: Literal["auto", "32-true", "bf16-mixed"]
    compile: bool

    @model_validator(mode="after")
    def _check_batch_size(self) -> TrainingParameters:
        n_parts = self.devices * self.accumulation_steps
        if self.batch_tokens is None and self.batch_size < n_parts:
            raise ValueError(
                f"batch_size must be at least devices * accumulation_steps = {n_parts}, a sequence "
                f"for each part of a step; got {self.batch_size}"
            )
        return self

    @model_validator(mode="after")
    def _check_item_table(self) -> TrainingParameters:
        if self.item_table == "sharded" and self.loss.name != "cce":
            raise ValueError(
                "item_table: sharded needs the loss cce, which alone is computed over shards; "
                f"got loss {self.loss.name}"
            )
        if self.item_table == "sharded" and self.devices == 1:
            raise ValueError("item_table: sharded needs devices of at least 2, got 1")
        return self
