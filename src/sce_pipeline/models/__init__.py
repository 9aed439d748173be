"""Backbones: packed item ids in, hidden states of the real positions out; they know no losses."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from sce_pipeline.models.packing import Packing
from sce_pipeline.models.sasrec import SASRec
from sce_pipeline.parameters import SASRecParameters

__all__ = ["Packing", "SASRec", "build_model", "load_model"]


def build_model(parameters: SASRecParameters, n_items: int, max_length: int) -> SASRec:
    """Return a freshly initialised backbone for a catalogue and a longest history."""
    return SASRec(n_items, max_length, **parameters.model_dump(exclude={"name"}))


def load_model(parameters: SASRecParameters, weights: Mapping[str, Tensor]) -> SASRec:
    """Return the backbone with saved weights, which tell its catalogue and longest history.

    Raises:
        ValueError: The weights are of another architecture than ``parameters`` say.
    """
    try:
        n_items = weights["item_embedding.weight"].shape[0]
        max_length = weights["position_embedding.weight"].shape[0]
        model = build_model(parameters, n_items, max_length)
        model.load_state_dict(dict(weights))
    except (KeyError, RuntimeError) as error:
        raise ValueError(
            f"the saved weights do not fit training.model = {parameters!r}; "
            f"evaluate with the parameters that they were trained with: {error}"
        ) from error
    return model
