"""A Parquet file that is written where there is no table yet."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import polars as pl
from kedro.io import AbstractDataset, DatasetError


class NewTableDataset(AbstractDataset["pl.LazyFrame", None]):
    """Writes a lazy frame to a Parquet file, part after part, and never over a table.

    A table of the same name in any format is in the way: a log that somebody brought is not to be
    lost or shadowed. The file appears once it is whole.

    Example:
        ::

            synthetic_interactions:
              type: sce_pipeline.datasets.new_table.NewTableDataset
              filepath: data/01_raw/my_log/interactions.parquet
    """

    def __init__(self, *, filepath: str, metadata: dict[str, Any] | None = None) -> None:
        """Point to a file.

        Args:
            filepath: Local path of the file to write.
            metadata: For plugins; not used here.
        """
        self._filepath = Path(filepath)
        self.metadata = metadata

    def load(self) -> NoReturn:
        """Refuse: the table is read as any raw table is.

        Raises:
            DatasetError: Always.
        """
        raise DatasetError(f"{self._filepath} is only written here, never read")

    def save(self, data: pl.LazyFrame) -> None:
        """Write the table.

        Raises:
            DatasetError: There is a table already.
        """
        folder, stem = self._filepath.parent, self._filepath.stem
        if existing := sorted(file.name for file in folder.glob(f"{stem}.*")):
            raise DatasetError(
                f"{folder} already has {', '.join(existing)}, which is not written over: choose "
                "another data set or remove it"
            )
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder / f"unfinished_{self._filepath.name}"
        try:
            data.sink_parquet(unfinished)
            unfinished.rename(self._filepath)
        finally:
            unfinished.unlink(missing_ok=True)

    def _exists(self) -> bool:
        return self._filepath.is_file()

    def _describe(self) -> dict[str, Any]:
        return {"filepath": self._filepath.as_posix()}
