"""Exported recommenders, a folder for each version of the weights."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from kedro.io import AbstractDataset, DatasetError

from sce_pipeline.recommendation.bundle import (
    FACTS,
    UNFINISHED,
    Bundle,
    read_bundle,
    write_bundle,
)

logger = logging.getLogger(__name__)


class RecommenderFolderDataset(AbstractDataset[Bundle, Bundle]):
    """Writes a recommender to the folder of its weights' version, and reads the latest.

    A version that was exported before, perhaps before it was measured, is written anew.

    Args:
        filepath: The folder of all versions.
        metadata: Ignored here; read by plugins such as Kedro-Viz.
    """

    def __init__(self, *, filepath: str, metadata: dict[str, Any] | None = None) -> None:
        self._folder = Path(filepath)
        self.metadata = metadata

    def load(self) -> Bundle:
        """Read the latest version.

        Raises:
            DatasetError: There is none.
        """
        if not (versions := self._versions()):
            raise DatasetError(f"there is no exported recommender in {self._folder}")
        return read_bundle(versions[-1])

    def save(self, data: Bundle) -> None:
        """Write a version, which appears once it is whole; tell what an earlier one had more."""
        folder = self._folder / data.facts["weights_version"]
        earlier = {file.name for file in folder.glob("*")}
        write_bundle(folder, data)
        if gone := earlier - {file.name for file in folder.iterdir()}:
            logger.warning(
                "Removed what was exported of this version before and not asked for now: %s",
                ", ".join(sorted(gone)),
            )
        logger.info("Exported the recommender to %s", folder)

    def _versions(self) -> list[Path]:
        folders = (file.parent for file in self._folder.glob(f"*/{FACTS}"))
        return sorted(folder for folder in folders if folder.suffix != UNFINISHED)

    def _exists(self) -> bool:
        return bool(self._versions())

    def _describe(self) -> dict[str, Any]:
        return {"filepath": self._folder.as_posix()}
