"""A Parquet file that is written where there is no table yet."""

from __future__ import annotations

from typing import NoReturn

import polars as pl
from kedro.io import DatasetError

from sce_pipeline.datasets.streamed_table import StreamedTableDataset


class NewTableDataset(StreamedTableDataset):
    """Writes a lazy frame to a Parquet file, part after part, and never over a table.

    A table of the same name in any format is in the way: a log that somebody brought is not to be
    lost or shadowed. The file appears once it is whole.

    Example:
        ::

            synthetic_interactions:
              type: sce_pipeline.datasets.new_table.NewTableDataset
              filepath: data/01_raw/my_log/interactions.parquet
    """

    def load(self) -> NoReturn:
        """Refuse: the table is read as any raw table is.

        Raises:
            DatasetError: Always.
        """
        raise DatasetError(f"{self._filepath} is only written here, never read")

    def save(self, data: pl.DataFrame | pl.LazyFrame) -> None:
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
        super().save(data)
