"""What is on record of saved weights: their training history."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from sce_pipeline.parameters import ModelParameters
from sce_pipeline.provenance import ITEM_STAMP, differences

logger = logging.getLogger(__name__)

_MODEL: TypeAdapter[ModelParameters] = TypeAdapter(ModelParameters)

_OF_NO_MATTER = {"item_columns", "stride"}
"""Parameters of the data that change titles and training windows, but no held-out user."""


@dataclass(frozen=True)
class TrainingRecord:
    """How weights were trained, whatever the parameters of the run that loads them.

    Attributes:
        history: Their training history, with the version that both have.
    """

    history: Mapping[str, Any]

    @property
    def version(self) -> str:
        """The version of weights and history."""
        return str(self.history["version"])

    @property
    def model(self) -> ModelParameters:
        """The model's parameters."""
        return _MODEL.validate_python(self.history["parameters"]["model"])

    @property
    def max_length(self) -> int:
        """Most items of a history that the model reads."""
        return int(self.history["data_processing"]["max_length"])

    def check_items(self, found: str, place: str) -> None:
        """Check that the weights number the items of now.

        Weights from before there were such fingerprints are let through with a warning, since
        training again may take days.

        Args:
            found: The fingerprint of the items' ids in the order of their numbers.
            place: What has it, as it is called in the catalog.

        Raises:
            ValueError: The weights were trained on other items, or on items in another order.
        """
        origin = f"training_history.json of the version {self.version}"
        if ITEM_STAMP not in self.history:
            logger.warning(
                "It is not known whether %s number the items as the data does now: %s has no %s, "
                "as an earlier version of sce_pipeline wrote it. If the log has changed since, "
                "train again",
                self._weights,
                origin,
                ITEM_STAMP,
            )
        elif (known := self.history[ITEM_STAMP]) != found:
            raise ValueError(
                f"{self._weights} were trained on other items than those of now, or on items in "
                f"another order: the {ITEM_STAMP} is {known} in {origin}, but {found} in {place}; "
                "train again, or restore the log and the parameters that the weights were trained "
                "on and run the pipeline data_processing"
            )

    def check_held_out(self, made: Mapping[str, Any], place: str) -> None:
        """Check that held-out users are those that training with these parameters keeps.

        Under another split or other filters the weights may have been trained on the very targets,
        and of another length they would read other histories than in training.

        Args:
            made: The parameters with which the held-out users' sequences were made.
            place: What these are called in the catalog.

        Raises:
            ValueError: They were made with others than the sequences that trained the weights.
        """
        trained, tested = (
            {name: value for name, value in parameters.items() if name not in _OF_NO_MATTER}
            for parameters in (self.history["data_processing"], made)
        )
        if found := differences(trained, tested):
            raise ValueError(
                f"{self._weights} were trained on data with data_processing.{', '.join(found)} as "
                f"in {place}, so that they may know what they would be tested on: train again, or "
                "run the pipeline data_processing with the parameters of the weights"
            )

    @property
    def _weights(self) -> str:
        return f"the weights {self.version} of loss {self.history['parameters']['loss']['name']}"
