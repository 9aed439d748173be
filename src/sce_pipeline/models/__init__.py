"""Backbones: packed item ids in, hidden states of the real positions out; they know no losses."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from sce_pipeline.models.backbone import Backbone
from sce_pipeline.models.packing import Packing
from sce_pipeline.models.sasrec import SASRec
from sce_pipeline.parameters import SASRecParameters

__all__ = ["Backbone", "Packing", "SASRec", "build_model", "load_model"]


def build_model(parameters: SASRecParameters, n_items: int, max_length: int) -> Backbone:
    """Return a freshly initialised backbone for a catalogue and a longest history."""
    return SASRec(n_items, max_length, **parameters.model_dump(exclude={"name"}))


def load_model(
    parameters: SASRecParameters, weights: Mapping[str, Tensor], max_length: int
) -> Backbone:
    """Return the backbone with saved weights, for histories of at most ``max_length`` items.

    Raises:
        ValueError: The weights are of another architecture or length than is asked for.
    """
    try:
        n_items = weights["item_embedding.weight"].shape[0]
        model = build_model(parameters, n_items, max_length)
        model.load_state_dict(dict(weights))
    except (KeyError, RuntimeError) as error:
        raise ValueError(
            f"the saved weights do not fit training.model = {parameters!r} and max_length = "
            f"{max_length}; evaluate with the parameters that they were trained with: {error}"
        ) from error
    return model
