"""What is on record of saved weights: the training history of the same version."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from sce_pipeline.parameters import ModelParameters

_MODEL: TypeAdapter[ModelParameters] = TypeAdapter(ModelParameters)


@dataclass(frozen=True)
class TrainingRecord:
    """How weights were trained, whatever the parameters of the run that loads them.

    Attributes:
        dataset: The data set that they were trained on.
        loss: The loss that they were trained with.
        version: Their version.
        history: The training history of that version.
    """

    dataset: str
    loss: str
    version: str
    history: Mapping[str, Any]

    @property
    def model(self) -> ModelParameters:
        """The model's parameters."""
        return _MODEL.validate_python(self.history["parameters"]["model"])

    @property
    def max_length(self) -> int:
        """Most items of a history that the model reads."""
        return int(self.history["data_processing"]["max_length"])


def find_record(
    dataset: str,
    loss: str,
    weights_version: str,
    run_histories: Mapping[str, Callable[[], dict[str, Any]]],
) -> TrainingRecord:
    """Find the training history of weights among those of all losses and versions.

    Args:
        dataset: The data set of the run.
        loss: The loss of the run.
        weights_version: The version of the weights that are loaded.
        run_histories: Loaders by ``<loss>/training_history.json/<version>``.

    Raises:
        ValueError: The training history of these weights is not there.
    """
    name = f"{loss}/training_history.json/{weights_version}"
    if name not in run_histories:
        raise ValueError(
            f"there is no training history of the version {weights_version} of loss {loss}, "
            "without which the model's parameters are not known"
        )
    return TrainingRecord(dataset, loss, weights_version, run_histories[name]())
