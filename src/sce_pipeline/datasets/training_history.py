"""A training history that knows its version."""

from __future__ import annotations

from typing import Any

from kedro_datasets.json import JSONDataset


class TrainingHistoryDataset(JSONDataset):
    """A versioned JSON file of a training history, whose version is loaded with it.

    Weights and history of a run have one version, so whoever has the history can name the weights.

    Example:
        ::

            training_history:
              type: sce_pipeline.datasets.training_history.TrainingHistoryDataset
              filepath: data/06_models/my_log/ce/training_history.json
              versioned: true
    """

    def load(self) -> dict[str, Any]:
        """Return what was saved, and under ``version`` in which version."""
        return {**super().load(), "version": self.resolve_load_version()}
