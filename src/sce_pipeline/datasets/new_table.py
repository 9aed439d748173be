"""A Parquet file that is written where there is no table yet."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NoReturn

import polars as pl
from kedro.io import DatasetError
from polars.exceptions import PolarsError

from sce_pipeline.datasets.streamed_table import StreamedTableDataset

logger = logging.getLogger(__name__)


class NewTableDataset(StreamedTableDataset):
    """Writes a lazy frame to a Parquet file, part after part, and never over a table.

    A table of the same name in any format is in the way: a log that somebody brought is not to be
    lost or shadowed. Only one that holds just what would be written, as an earlier run left it, is
    left as it is. The file appears once it is whole.

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
        """Write the table, unless it is there.

        Raises:
            DatasetError: There is another table already.
        """
        folder, stem = self._filepath.parent, self._filepath.stem
        existing = sorted(file.name for file in folder.glob(f"{stem}.*"))
        if not existing:
            super().save(data)
        elif existing == [self._filepath.name] and _holds(self._filepath, data.lazy()):
            logger.info("%s is there already, with just these rows", self._filepath)
        else:
            raise DatasetError(
                f"{folder} already has {', '.join(existing)}, which is not written over: choose "
                "another data set or remove it"
            )


def _holds(file: Path, table: pl.LazyFrame) -> bool:
    """Tell whether a file holds the rows of a table in their order, part after part."""
    found = pl.scan_parquet(file, glob=False)
    try:
        if found.collect_schema() != table.collect_schema():
            return False
    except PolarsError:  # it is no Parquet file
        return False
    lengths = [
        each.select(pl.first().len()).collect(engine="streaming").item() for each in (found, table)
    ]
    if lengths[0] != lengths[1]:
        return False
    pairs = pl.concat(
        [found.select(found=pl.struct(pl.all())), table.select(asked=pl.struct(pl.all()))],
        how="horizontal",
    )
    different = pairs.filter(pl.col("found").ne_missing(pl.col("asked"))).head(1)
    return different.collect(engine="streaming").is_empty()
