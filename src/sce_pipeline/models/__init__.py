"""Backbones: packed item ids in, hidden states of the real positions out; they know no losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sce_pipeline.models.backbone import Backbone
from sce_pipeline.models.bert4rec import BERT4Rec
from sce_pipeline.models.gru4rec import GRU4Rec
from sce_pipeline.models.masking import MASKING, draw_mask
from sce_pipeline.models.packing import Packing
from sce_pipeline.models.sasrec import SASRec

if TYPE_CHECKING:  # whoever only serves a model needs no pydantic
    from sce_pipeline.parameters import ModelParameters

MODELS: dict[str, Callable[..., Backbone]] = {
    "sasrec": SASRec,
    "gru4rec": GRU4Rec,
    "bert4rec": BERT4Rec,
}
"""Each backbone by the ``name`` of its parameters; their other fields are its arguments."""

__all__ = [
    "MODELS",
    "BERT4Rec",
    "Backbone",
    "GRU4Rec",
    "Packing",
    "SASRec",
    "build_model",
    "draw_mask",
    "load_model",
    "network_arguments",
]


def network_arguments(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of the network out of a model's parameters: no name, no masking."""
    return {name: value for name, value in model.items() if name not in {"name", *MASKING}}


def build_model(parameters: ModelParameters, n_items: int, max_length: int) -> Backbone:
    """Return a freshly initialised backbone for a catalogue and a longest history."""
    arguments = network_arguments(parameters.model_dump())
    return MODELS[parameters.name](n_items, max_length, **arguments)


def load_model(
    parameters: ModelParameters, weights: Mapping[str, Tensor], max_length: int
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
