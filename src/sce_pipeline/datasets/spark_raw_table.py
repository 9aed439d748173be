"""A table as users bring it, for Spark: Parquet in any number of files, or a CSV file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from kedro.io import AbstractDataset
from kedro_datasets.spark import SparkDatasetV2
from pyspark.sql import Window
from pyspark.sql import functions as F

from sce_pipeline.datasets.raw_table import RawTableDataset, require_free_names
from sce_pipeline.datasets.streamed_table import StreamedTableDataset
from sce_pipeline.interactions.columns import ROW

if TYPE_CHECKING:
    from pyspark.sql import DataFrame


class SparkRawTableDataset(AbstractDataset[None, "DataFrame | None"]):
    """Reads what ``RawTableDataset`` reads, and folders of Parquet files, into a Spark frame.

    Parquet is read where it lies, by all executors; the rows of a folder are counted file after
    file in the order of the files' names. Text is read as it is without Spark, with the same checks
    and on the driver, as a file with quotes can only be read from its beginning, and is handed to
    Spark as Parquet.

    Example:
        ::

            raw_interactions:
              type: sce_pipeline.datasets.spark_raw_table.SparkRawTableDataset
              filepath: data/01_raw/my_log/interactions
              staging:
                filepath: data/02_intermediate/my_log/raw_interactions.parquet
    """

    def __init__(
        self,
        *,
        filepath: str,
        staging: dict[str, str],
        optional: bool = False,
        set_aside_malformed: bool = False,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        """Point to a table.

        Args:
            filepath: Path of the file or folder without its suffix. Beyond the local disk, as in
                hdfs://…, there is only Parquet.
            staging: The ``filepath`` to which text is handed over, seen by driver and executors.
            optional: Load None where there is no table.
            set_aside_malformed: As ``RawTableDataset`` takes it.
            metadata: For plugins; not used here.
        """
        self._table = RawTableDataset(
            filepath=filepath, optional=optional, set_aside_malformed=set_aside_malformed
        )
        self._filepath = f"{filepath}.parquet"
        self._parquet = SparkDatasetV2(filepath=self._filepath)
        self._staging = staging["filepath"]
        self._is_remote = "://" in filepath
        self._optional = optional
        self._set_aside_malformed = set_aside_malformed
        self.metadata = metadata

    def load(self) -> DataFrame | None:
        """Find the table and begin to read it.

        Raises:
            DatasetError: There is no table or more than one, or it has a column of a name
                that is given to columns here; or it is text that cannot be read.
        """
        if self._is_remote and self._optional and not self._parquet.exists():
            return None
        if self._is_remote or [file.suffix for file in self._table.find_files()] == [".parquet"]:
            table = self._parquet.load()
            require_free_names(table.columns, self._set_aside_malformed, self._filepath)
            return _number_rows(table)
        text = self._table.load()
        if text is None:
            return None
        StreamedTableDataset(filepath=self._staging).save(text)
        return SparkDatasetV2(filepath=self._staging).load()

    def save(self, data: Any) -> NoReturn:
        """Refuse: raw data is only read.

        Raises:
            DatasetError: Always.
        """
        self._table.save(data)

    def _exists(self) -> bool:
        return bool(self._parquet.exists() if self._is_remote else self._table.exists())

    def _describe(self) -> dict[str, Any]:
        return {"filepath": self._parquet._describe()["filepath"], "optional": self._optional}


def _number_rows(table: DataFrame) -> DataFrame:
    """Add the place of each row, which is that in its file after the rows of the files before."""
    file, place = F.col("_metadata.file_path"), F.col("_metadata.row_index")
    files = table.groupBy(file.alias("_file")).agg((F.max(place) + 1).alias("_rows"))
    before = Window.orderBy("_file").rowsBetween(Window.unboundedPreceding, -1)
    starts = files.select(
        "_file", F.coalesce(F.sum("_rows").over(before), F.lit(0)).alias("_start")
    )
    placed = table.withColumns({"_file": file, "_place": place}).join(F.broadcast(starts), "_file")
    return placed.select(*table.columns, (F.col("_start") + F.col("_place")).alias(ROW))
