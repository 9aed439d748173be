"""A Parquet file that is there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import polars as pl
from kedro.io import AbstractDataset


class WholeTableDataset(AbstractDataset[pl.DataFrame, pl.LazyFrame]):
    """Writes a frame to a Parquet file that appears under its name once it is on the disk.

    What a killed run leaves ends in ``.unfinished``, and nobody reads it.

    Example:
        ::

            parts:
              type: partitions.PartitionedDataset
              path: data/07_model_output/parts
              dataset: sce_pipeline.datasets.whole_table.WholeTableDataset
              filename_suffix: .parquet
    """

    def __init__(self, *, filepath: str, metadata: dict[str, Any] | None = None) -> None:
        """Point to a file.

        Args:
            filepath: Local path of the file.
            metadata: For plugins; not used here.
        """
        self._filepath = Path(filepath)
        self.metadata = metadata

    def load(self) -> pl.LazyFrame:
        """Begin to read the file, lazily."""
        return pl.scan_parquet(self._filepath, glob=False)

    def save(self, data: pl.DataFrame) -> None:
        """Write the frame, in place of an earlier one."""
        self._filepath.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self._filepath.with_name(f"{self._filepath.name}.{os.getpid()}.unfinished")
        try:
            with unfinished.open("wb") as file:
                data.write_parquet(file)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(self._filepath)
        finally:
            unfinished.unlink(missing_ok=True)

    def _exists(self) -> bool:
        return self._filepath.is_file()

    def _describe(self) -> dict[str, Any]:
        return {"filepath": self._filepath.as_posix()}
