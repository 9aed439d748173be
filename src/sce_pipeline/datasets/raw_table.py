"""A table as users bring it: a CSV file, plain or gzipped, or a Parquet file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import polars as pl
from kedro.io import AbstractDataset, DatasetError
from polars.exceptions import PolarsError
from polars.io.plugins import register_io_source

from sce_pipeline.interactions.columns import ROW

_SUFFIXES = (".csv", ".csv.gz", ".parquet")
_REPEATED = re.compile(r"_duplicated_\d+$")  # what Polars appends to a repeated name


class RawTableDataset(AbstractDataset[None, "pl.LazyFrame | None"]):
    """Reads ``<filepath>.csv``, ``<filepath>.csv.gz`` or ``<filepath>.parquet``, lazily.

    All columns of a CSV file are read as text: what is a number or a date, and what is neither, is
    for the pipeline to tell and to count. The column ``row`` (Int64) is added: the place of each
    row in the file, counted from 0. Errors name the file, also those that show only while it is
    being read.

    Example:
        ::

            raw_interactions:
              type: sce_pipeline.datasets.raw_table.RawTableDataset
              filepath: data/01_raw/my_log/interactions
    """

    def __init__(
        self, *, filepath: str, optional: bool = False, metadata: dict[str, Any] | None = None
    ) -> None:
        """Point to a table.

        Args:
            filepath: Local path of the file without its suffix; its folder is the data set.
            optional: Load None where there is no file.
            metadata: For plugins; not used here.
        """
        self._filepath = Path(filepath)
        self._optional = optional
        self.metadata = metadata

    def load(self) -> pl.LazyFrame | None:
        """Find the file and begin to read it.

        Raises:
            DatasetError: There is no file or more than one, or it holds no table or no row.
        """
        files = self._find_files()
        if len(files) > 1:
            raise DatasetError(
                f"Expected one file, found {' and '.join(file.name for file in files)} in "
                f"{self._filepath.parent}: remove all but one"
            )
        if files:
            return _scan(files[0])
        if self._optional:
            return None
        raise DatasetError(self._describe_absence())

    def save(self, data: Any) -> NoReturn:
        """Refuse: raw data is only read.

        Raises:
            DatasetError: Always.
        """
        raise DatasetError(f"{self._filepath} is raw data and is only read, never written")

    def _exists(self) -> bool:
        return bool(self._find_files())

    def _describe(self) -> dict[str, Any]:
        return {"filepath": self._filepath.as_posix(), "optional": self._optional}

    def _find_files(self) -> list[Path]:
        candidates = [
            self._filepath.with_name(self._filepath.name + suffix) for suffix in _SUFFIXES
        ]
        return [file for file in candidates if file.is_file()]

    def _describe_absence(self) -> str:
        folder, stem = self._filepath.parent, self._filepath.name
        existing = sorted(
            {
                file.parent.name
                for suffix in _SUFFIXES
                for file in folder.parent.glob(f"*/{stem}{suffix}")
            }
        )
        problem = (
            f"No table {stem!r} in {folder}"
            if folder.is_dir()
            else f"Unknown dataset {folder.name!r}: there is no folder {folder}"
        )
        return (
            f"{problem}. Expected {', '.join(stem + suffix for suffix in _SUFFIXES[:-1])} or "
            f"{stem + _SUFFIXES[-1]} in it. Datasets in {folder.parent}: "
            f"{', '.join(existing) or 'none'}"
        )


def _scan(file: Path) -> pl.LazyFrame:
    """Begin to read a file, lazily; an error names it whenever it comes up."""
    with _naming(file):
        table = pl.scan_parquet(file, glob=False) if file.suffix == ".parquet" else _scan_csv(file)
        columns = ", ".join(table.collect_schema())
        if ROW in table.collect_schema():
            raise DatasetError(f"{file}: rename its column {ROW!r}, here the name of row numbers")
        table = table.with_row_index(ROW).with_columns(pl.col(ROW).cast(pl.Int64))
        schema = table.collect_schema()
        if table.head(1).collect().is_empty():
            raise DatasetError(f"{file} has columns but no rows: {columns}")

    def read(
        columns: list[str] | None, predicate: pl.Expr | None, n_rows: int | None, size: int | None
    ) -> Iterator[pl.DataFrame]:
        part = table if n_rows is None else table.head(n_rows)
        part = part if predicate is None else part.filter(predicate)
        part = part if columns is None else part.select(columns)
        with _naming(file):
            yield from part.collect_batches(chunk_size=size)

    return register_io_source(read, schema=schema, is_pure=True)


def _scan_csv(file: Path) -> pl.LazyFrame:
    table = pl.scan_csv(file, infer_schema=False, glob=False)
    names = table.collect_schema().names()
    header = ", ".join(names)
    if not header.isprintable() or "\N{REPLACEMENT CHARACTER}" in header:
        raise DatasetError(f"{file} is not comma-separated text; it begins with {header[:60]!r}")
    if len(names) == 1 and any(separator in header for separator in ";\t|"):
        raise DatasetError(f"{file} must be separated by commas; its header is {header[:60]!r}")
    if repeated := [name for name in names if _REPEATED.search(name)]:
        name = _REPEATED.sub("", repeated[0])
        raise DatasetError(f"{file} has the column {name!r} more than once: rename or remove one")
    return table


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    try:
        yield
    except (PolarsError, OSError) as error:
        raise DatasetError(f"Cannot read {file}: {error}") from error
