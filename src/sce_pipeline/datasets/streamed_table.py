"""A Parquet file that is written part after part, and appears once it is whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
from kedro.io import AbstractDataset, DatasetError

from sce_pipeline.datasets.whole_files import whole


class StreamedTableDataset(AbstractDataset["pl.DataFrame | pl.LazyFrame", "pl.LazyFrame"]):
    """Writes a frame, a lazy one without ever holding all of it, and reads it lazily.

    The file appears under its name once it is on the disk. Kedro's LazyPolarsDataset computes the
    whole frame before it writes.

    Example:
        ::

            rejected_interactions:
              type: sce_pipeline.datasets.streamed_table.StreamedTableDataset
              filepath: data/02_intermediate/my_log/rejected_interactions.parquet
    """

    def __init__(self, *, filepath: str, metadata: dict[str, Any] | None = None) -> None:
        """Point to a file.

        Args:
            filepath: Local path of the Parquet file.
            metadata: For plugins; not used here.
        """
        self._filepath = Path(filepath)
        self.metadata = metadata

    def load(self) -> pl.LazyFrame:
        """Begin to read the table.

        Raises:
            DatasetError: There is no such file, nor a folder of such files, as Spark writes.
        """
        if not self._exists():
            raise DatasetError(f"There is no {self._filepath}: run what writes it first")
        return pl.scan_parquet(self._filepath, glob=False)

    def save(self, data: pl.DataFrame | pl.LazyFrame) -> None:
        """Write the table, over an older one if need be."""
        # An open stream, which is there, or not, when Polars fails.
        with whole(self._filepath) as unfinished, unfinished.open("wb") as stream:
            data.lazy().sink_parquet(stream)

    def _exists(self) -> bool:
        return self._filepath.exists()

    def _describe(self) -> dict[str, Any]:
        return {"filepath": self._filepath.as_posix()}
