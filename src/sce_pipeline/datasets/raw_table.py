"""A table as users bring it: a CSV file, plain or gzipped, or a Parquet file."""

from __future__ import annotations

import codecs
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

import polars as pl
from kedro.io import AbstractDataset, DatasetError
from polars.exceptions import PanicException, PolarsError
from polars.io.plugins import register_io_source

from sce_pipeline.datasets.csv_faults import LONGEST_RECORD, find_fault, find_header_fault, open_log
from sce_pipeline.datasets.gzip_bombs import find_long_record
from sce_pipeline.datasets.malformed_csv import read_around_malformed
from sce_pipeline.datasets.parquet_bombs import find_bomb
from sce_pipeline.interactions.columns import MALFORMED, MALFORMED_RECORD, ROW

_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # which begins like UTF-16
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}

_ZSTD = b"\x28\xb5\x2f\xfd"  # which Polars would unpack, without bounds

_SUFFIXES = (".csv", ".csv.gz", ".parquet")
_LISTED = 10  # data sets in a message
_REPEATED = re.compile(r"_duplicated_\d+$")  # what Polars appends to a repeated name


class RawTableDataset(AbstractDataset[None, "pl.LazyFrame | None"]):
    """Reads ``<filepath>.csv``, ``<filepath>.csv.gz`` or ``<filepath>.parquet``, lazily.

    All columns of a CSV file are read as text: what is a number or a date, and what is neither, is
    for the pipeline to tell and to count. The column ``row`` (Int64) is added: the place of each
    row in the file, counted from 0. Errors name the file, also those that show only while it is
    being read.

    A record of a CSV file that cannot be read, for it has too many values, a misplaced quote or
    bytes that are not UTF-8, is an error. With ``set_aside_malformed`` it is a row of nulls, of
    which the columns ``malformed`` and ``malformed_record`` (String, null for all other rows) say
    what is wrong and what the record holds. A Parquet file has no such columns.

    Example:
        ::

            raw_interactions:
              type: sce_pipeline.datasets.raw_table.RawTableDataset
              filepath: data/01_raw/my_log/interactions
              set_aside_malformed: true
    """

    def __init__(
        self,
        *,
        filepath: str,
        optional: bool = False,
        may_be_empty: bool = False,
        set_aside_malformed: bool = False,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        """Point to a table.

        Args:
            filepath: Local path of the file without its suffix; its folder is the data set.
            optional: Load None where there is no file.
            may_be_empty: Load None where the file has columns but no rows, rather than refuse it.
            set_aside_malformed: Go on after malformed records of a CSV file and tell them, rather
                than refuse the file. It is read once more, to see whether there are any.
            metadata: For plugins; not used here.
        """
        self._filepath = Path(filepath)
        self._optional = optional
        self._may_be_empty = may_be_empty
        self._set_aside_malformed = set_aside_malformed
        self.metadata = metadata

    def find_files(self) -> list[Path]:
        """List what there is under the names that a table may have."""
        candidates = [
            self._filepath.with_name(self._filepath.name + suffix) for suffix in _SUFFIXES
        ]
        return [file for file in candidates if os.path.lexists(file)]

    def load(self) -> pl.LazyFrame | None:
        """Find the file and begin to read it.

        Raises:
            DatasetError: There is no file or more than one, or it holds no table or no row.
                What is a folder or a link to nowhere is no file either, and no reason to go on
                without an optional table.
        """
        files = self.find_files()
        if len(files) > 1:
            raise DatasetError(
                f"Expected one file, found {' and '.join(file.name for file in files)} in "
                f"{self._filepath.parent}: remove all but one"
            )
        if files:
            _require_file(files[0])
            return _scan(files[0], self._may_be_empty, self._set_aside_malformed)
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
        return bool(self.find_files())

    def _describe(self) -> dict[str, Any]:
        return {
            "filepath": self._filepath.as_posix(),
            "optional": self._optional,
            "may_be_empty": self._may_be_empty,
            "set_aside_malformed": self._set_aside_malformed,
        }

    def _describe_absence(self) -> str:
        folder, stem = self._filepath.parent, self._filepath.name
        existing = sorted(
            {
                file.parent.name
                for suffix in _SUFFIXES
                for file in folder.parent.glob(f"*/{stem}{suffix}")
            }
        )
        if folder.is_dir():
            problem = f"No table {stem!r} in {folder}."
        else:
            problem = f"Unknown dataset {folder.name!r}: there is no folder {folder}."
            if close := get_close_matches(folder.name, existing):
                problem += f" Did you mean {' or '.join(map(repr, close))}?"
        listed = ", ".join(existing[:_LISTED]) or "none"
        if (n_more := len(existing) - _LISTED) > 0:
            listed += f" and {n_more} more"
        return (
            f"{problem} Expected {', '.join(stem + suffix for suffix in _SUFFIXES[:-1])} or "
            f"{stem + _SUFFIXES[-1]} in it. Datasets in {folder.parent}: {listed}"
        )


def _require_file(file: Path) -> None:
    if file.is_file():
        return
    if file.is_dir():
        found = "a folder"
    elif file.is_symlink():
        found = f"a link to {file.readlink()}, where there is no file"
    else:
        found = "neither a file nor a link to one"
    raise DatasetError(f"{file} is {found}; expected a file")


def require_free_names(names: list[str], set_aside_malformed: bool, table: str) -> None:
    """Check that a table, so called, has no column of a name that is given to columns here.

    Raises:
        DatasetError: It has one.
    """
    if ROW in names:
        raise DatasetError(f"{table}: rename its column {ROW!r}, here the name of row numbers")
    for name in (MALFORMED, MALFORMED_RECORD) if set_aside_malformed else ():
        if name in names:
            raise DatasetError(
                f"{table}: rename its column {name!r}, here a name for what is malformed"
            )


def _scan(file: Path, may_be_empty: bool, set_aside_malformed: bool) -> pl.LazyFrame | None:
    """Begin to read a file, lazily; an error names it whenever it comes up."""
    is_text = file.suffix != ".parquet"
    with _naming(file):
        bomb = _find_long_record(file, set_aside_malformed) if is_text else None
        if bomb and (not set_aside_malformed or find_header_fault(file)):
            raise DatasetError(bomb)
        table = _scan_csv(file) if is_text else _scan_parquet(file)
        names = table.collect_schema().names()
        require_free_names(names, set_aside_malformed, str(file))
        table = table.with_row_index(ROW).with_columns(pl.col(ROW).cast(pl.Int64))
        if is_text and set_aside_malformed:
            null = pl.lit(None, pl.String)
            told = table.with_columns(null.alias(MALFORMED), null.alias(MALFORMED_RECORD))
            if bomb or not _is_sound(table):
                return _scan_around_malformed(file, told.collect_schema())
            table = told
        if table.head(1).collect().is_empty():
            if may_be_empty:
                return None
            raise DatasetError(f"{file} has columns but no rows: {', '.join(names)}")

    schema = table.collect_schema()
    # Polars sees values too many in a row of text, which shift the others, where it reads all
    # columns: the first reading does.
    is_whole = not is_text or set_aside_malformed

    def read(
        columns: list[str] | None, predicate: pl.Expr | None, n_rows: int | None, size: int | None
    ) -> Iterator[pl.DataFrame]:
        part = table if n_rows is None else table.head(n_rows)
        part = part if predicate is None else part.filter(predicate)
        names = list(schema) if columns is None else columns
        nonlocal is_whole
        part = part.select(names) if is_whole else part
        with _naming(file):
            for batch in part.collect_batches(chunk_size=size):
                yield batch.select(names)
        is_whole = is_whole or n_rows is None

    return register_io_source(read, schema=schema, is_pure=True)


def _is_sound(table: pl.LazyFrame) -> bool:
    """Read a file to nowhere, to see whether Polars can.

    No later reading may find out: before Polars says that it fails, it hands on rows from behind
    the place at which it does.
    """
    try:
        for _ in table.collect_batches():
            pass
    except (PolarsError, PanicException):
        return False
    return True


def _scan_around_malformed(file: Path, schema: pl.Schema) -> pl.LazyFrame:
    def read(
        columns: list[str] | None, predicate: pl.Expr | None, n_rows: int | None, _size: int | None
    ) -> Iterator[pl.DataFrame]:
        names = list(schema) if columns is None else columns
        with _naming(file, of_records=False):
            for part in read_around_malformed(file):
                found = part if n_rows is None else part.filter(pl.col(ROW) < n_rows)
                found = found if predicate is None else found.filter(predicate)
                yield found.select(names)
                if n_rows is not None and part[ROW][-1] + 1 >= n_rows:
                    return

    return register_io_source(read, schema=schema, is_pure=True)


def _scan_parquet(file: Path) -> pl.LazyFrame:
    if bomb := find_bomb(file):
        raise DatasetError(
            f"{file} would fill the memory: {bomb}. If that is right, write it with smaller row "
            "groups and without the long values"
        )
    return pl.scan_parquet(file, glob=False)


def _scan_csv(file: Path) -> pl.LazyFrame:
    table = pl.scan_csv(file, infer_schema=False, glob=False)
    names = table.collect_schema().names()
    header = ", ".join(names)
    if encoding := _foreign_encoding(file):
        raise DatasetError(
            f"{file} is text in {encoding}, expected UTF-8: convert it with "
            f"iconv -f {encoding} -t utf-8"
        )
    if not header.isprintable() or "\N{REPLACEMENT CHARACTER}" in header:
        raise DatasetError(f"{file} is not comma-separated text; it begins with {header[:60]!r}")
    if len(names) == 1 and any(separator in header for separator in ";\t|"):
        raise DatasetError(f"{file} must be separated by commas; its header is {header[:60]!r}")
    if fault := find_header_fault(file):
        raise DatasetError(f"Cannot read {file}: {fault}")
    if repeated := [name for name in names if _REPEATED.search(name)]:
        name = _REPEATED.sub("", repeated[0])
        raise DatasetError(f"{file} has the column {name!r} more than once: rename or remove one")
    return table


def _foreign_encoding(file: Path) -> str | None:
    """Tell UTF-16 and UTF-32 by the mark at the beginning, or by every other byte being NUL."""
    with open_log(file) as stream:
        start = stream.read(64)
    for mark, encoding in _MARKS.items():
        if start.startswith(mark):
            return encoding
    evens, odds = start[::2], start[1::2]
    if odds and not any(odds) and all(evens):
        return "UTF-16LE"
    return "UTF-16BE" if evens and not any(evens) and all(odds) else None


def _find_long_record(file: Path, also_plain: bool) -> str | None:
    """Find a record that fills the memory; rows without end are no trouble.

    The file is read in parts, but a record has to be held as a whole. One that is gzipped is
    unpacked once to see, which takes about as long as Polars takes to count its rows: 5 seconds a
    gigabyte of text. In a plain file, of which a record takes as much of the disk, it is looked for
    where quotes that are not closed are no reason to stop: with the rest of the file behind one,
    Polars takes nine times its size.
    """
    with file.open("rb") as stream:
        start = stream.read(4)
    if start == _ZSTD:
        raise DatasetError(f"{file} is compressed with zstd, expected text or gzip")
    if not start.startswith(b"\x1f\x8b") and not also_plain:
        return None
    if (line := find_long_record(file, LONGEST_RECORD)) is None:
        return None
    return (
        f"{file}: line {line} begins a record of {LONGEST_RECORD:,} bytes or more, which no "
        "log has: is a quote not closed?"
    )


@contextmanager
def _naming(file: Path, *, of_records: bool = True) -> Iterator[None]:
    """Name a file in errors, and its first malformed record where errors may be of records."""
    try:
        yield
    except (PolarsError, PanicException, OSError, EOFError, zlib.error) as error:
        fault = find_fault(file) if of_records and file.suffix != ".parquet" else None
        reason = str(error).strip().partition("\n\n")[0]  # what follows is advice about Polars
        raise DatasetError(f"Cannot read {file}: {fault or reason}") from error
