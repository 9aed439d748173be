"""What is on record of saved weights: the training history of the same version."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from sce_pipeline.parameters import ModelParameters
from sce_pipeline.provenance import ITEM_STAMP

logger = logging.getLogger(__name__)

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
        trained = f"the weights {self.version} of loss {self.loss}"
        origin = f"training_history.json of the version {self.version}"
        if ITEM_STAMP not in self.history:
            logger.warning(
                "It is not known whether %s number the items of %s as its data does now: %s has no "
                "%s, as an earlier version of sce_pipeline wrote it. If the log of %s has changed "
                "since, train again",
                trained,
                self.dataset,
                origin,
                ITEM_STAMP,
                self.dataset,
            )
        elif (known := self.history[ITEM_STAMP]) != found:
            raise ValueError(
                f"{trained} were trained on other items of {self.dataset} than those of now, or on "
                f"items in another order: the {ITEM_STAMP} is {known} in {origin}, but {found} in "
                f"{place}; train again, or restore the log and the parameters that the weights "
                "were trained on and run the pipeline data_processing"
            )


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
