"""Losses over a catalogue of items, all behind the interface of ``Loss``.

To add one, write its file here, its parameter class in ``sce_pipeline.parameters.losses`` and its
preset in ``conf/base/parameters/losses.yml``, and name it in ``LOSSES``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from sce_pipeline.losses.base import Histories, Loss
from sce_pipeline.losses.bce import BCE, GBCE
from sce_pipeline.losses.cce import CCE
from sce_pipeline.losses.cce_minus import CCEMinus
from sce_pipeline.losses.ce import CE
from sce_pipeline.losses.ce_minus import CEMinus
from sce_pipeline.losses.rece import RECE
from sce_pipeline.losses.sce import SCE

if TYPE_CHECKING:
    from sce_pipeline.parameters import LossParameters

LOSSES: dict[str, Callable[..., Loss]] = {
    "ce": CE,
    "cce": CCE,
    "ce_minus": CEMinus,
    "cce_minus": CCEMinus,
    "bce": BCE,
    "gbce": GBCE,
    "sce": SCE,
    "rece": RECE,
}
"""Each loss by the ``name`` of its parameters; their other fields are its arguments."""

__all__ = ["LOSSES", "Histories", "Loss", "build_loss"]


def build_loss(parameters: LossParameters) -> Loss:
    """Return the loss that ``parameters`` name, built with their other values."""
    return LOSSES[parameters.name](**parameters.model_dump(exclude={"name"}))
