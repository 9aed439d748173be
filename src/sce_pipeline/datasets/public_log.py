"""A public log, fetched when it is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import polars as pl
from kedro.io import AbstractDataset, DatasetError

from sce_pipeline.downloads import DownloadError
from sce_pipeline.downloads.logs import is_obtained, obtain, record_of
from sce_pipeline.downloads.sources import find_source
from sce_pipeline.downloads.tables import read_tables


class PublicLogDataset(AbstractDataset[NoReturn, "dict[str, pl.LazyFrame]"]):
    """Fetches a public log by its name and begins to read it, lazily.

    Example:
        ::

            public_log:
              type: sce_pipeline.datasets.public_log.PublicLogDataset
              name: movielens_1m
              filepath: data/01_raw/movielens_1m/download
    """

    def __init__(self, *, name: str, filepath: str, metadata: dict[str, Any] | None = None) -> None:
        """Point to a log.

        Args:
            name: The log's name in ``downloads.sources``.
            filepath: Local folder for what is downloaded, within the data set's own.
            metadata: For plugins; not used here.
        """
        self._name = name
        self._folder = Path(filepath)
        self.metadata = metadata

    def load(self) -> dict[str, pl.LazyFrame]:
        """Fetch the log, unless it is there already.

        Returns:
            Its tables, ``interactions`` and, where there are titles, ``items``.

        Raises:
            DatasetError: It is not to be had, or the data set has a table already, but not the
                file of which that would have been made.
        """
        folder = self._folder.parent
        stems = ("interactions", "items")
        existing = sorted(file.name for stem in stems for file in folder.glob(f"{stem}.*"))
        try:
            source = find_source(self._name)
            if existing and not is_obtained(source, self._folder):
                raise DatasetError(
                    f"{folder} already has {', '.join(existing)}, which is not written over: "
                    "remove it to fetch the log anew"
                )
            file = obtain(source, self._folder)
        except DownloadError as error:
            raise DatasetError(str(error)) from error
        try:
            return read_tables(source, file)
        except DownloadError as error:  # the file stays, as it may be right and read wrongly
            raise DatasetError(
                f"{error}. To fetch it anew remove {file} and {record_of(file)}"
            ) from error

    def save(self, data: Any) -> NoReturn:
        """Refuse: others publish the log.

        Raises:
            DatasetError: Always.
        """
        raise DatasetError(f"the public log {self._name!r} is only read, never written")

    def _describe(self) -> dict[str, Any]:
        return {"name": self._name, "filepath": self._folder.as_posix()}
