"""A catalog entry that hands a folder for checkpoints to the node that trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

from kedro.io import AbstractDataset, DatasetError


class CheckpointFolderDataset(AbstractDataset[NoReturn, Path]):
    """An input whose ``load`` creates a local folder and returns its path.

    Training writes checkpoints while its node still runs, which no ordinary output can do; with
    this entry the place stays in the catalog and the node gets it as an argument.

    Args:
        filepath: The folder.
        metadata: Ignored here; read by plugins such as Kedro-Viz.
    """

    def __init__(self, *, filepath: str, metadata: dict[str, Any] | None = None) -> None:
        self._folder = Path(filepath)
        self.metadata = metadata

    def load(self) -> Path:
        """Create the folder where it is missing and return its path."""
        self._folder.mkdir(parents=True, exist_ok=True)
        return self._folder

    def save(self, data: NoReturn) -> None:
        """Refuse: checkpoints are written by training itself.

        Raises:
            DatasetError: Always.
        """
        raise DatasetError(f"{self._folder} is a folder for checkpoints: it can only be an input")

    def _describe(self) -> dict[str, Any]:
        return {"filepath": str(self._folder)}

    def _exists(self) -> bool:
        return self._folder.is_dir()
