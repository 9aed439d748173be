"""Tables that Spark writes and that are read without it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kedro.io import AbstractDataset
from kedro_datasets.polars import LazyPolarsDataset
from kedro_datasets.spark import SparkDatasetV2

if TYPE_CHECKING:
    import polars as pl
    from pyspark.sql import DataFrame


class HandedOverDataset(AbstractDataset["DataFrame", "pl.LazyFrame"]):
    """Writes a Spark frame as a folder of Parquet files, and reads it lazily with Polars.

    Example:
        ::

            encoded_interactions:
              type: sce_pipeline.datasets.handed_over.HandedOverDataset
              filepath: data/05_model_input/my_log/encoded_interactions.parquet
    """

    def __init__(self, *, filepath: str, metadata: dict[str, Any] | None = None) -> None:
        """Point to a folder.

        Args:
            filepath: Path of the folder, seen by driver and executors.
            metadata: For plugins; not used here.
        """
        self._written = SparkDatasetV2(filepath=filepath, save_args={"mode": "overwrite"})
        self._read = LazyPolarsDataset(filepath=filepath, file_format="parquet")
        self._filepath = filepath
        self.metadata = metadata

    def load(self) -> pl.LazyFrame:
        """Begin to read the table."""
        return self._read.load()

    def save(self, data: DataFrame) -> None:
        """Write the table, over an older one if need be."""
        self._written.save(data)

    def _exists(self) -> bool:
        return bool(self._read.exists())

    def _describe(self) -> dict[str, Any]:
        return {"filepath": self._filepath}
