"""Records in Python's notation, one a line: literals alone are read, nothing is run."""

from __future__ import annotations

import ast
import gzip
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import polars as pl
from polars.io.plugins import register_io_source

from sce_pipeline.downloads.errors import DownloadError

LONGEST = 2**20
"""Bytes of the longest line that is read."""

_BATCH = 50_000  # rows


def scan_records(file: Path, names: dict[str, str]) -> pl.LazyFrame:
    """Begin to read a gzipped file of dictionaries, lazily.

    Args:
        file: The file.
        names: For each key that is read, the name of its column.

    Returns:
        The values as text, null where a record lacks them.

    Raises:
        DownloadError: While it is read: a line is no dictionary or has a value that is no text.
    """
    schema = pl.Schema(dict.fromkeys(names.values(), pl.String))

    def read(
        columns: list[str] | None, predicate: pl.Expr | None, n_rows: int | None, size: int | None
    ) -> Iterator[pl.DataFrame]:
        rows = islice(_read_rows(file, list(names)), n_rows)
        while batch := list(islice(rows, size or _BATCH)):
            part = pl.DataFrame(batch, schema=schema, orient="row")
            part = part if predicate is None else part.filter(predicate)
            yield part if columns is None else part.select(columns)

    return register_io_source(read, schema=schema, is_pure=True)


def _read_rows(file: Path, keys: list[str]) -> Iterator[tuple[str | None, ...]]:
    with gzip.open(file) as stream:
        for number, line in enumerate(iter(lambda: stream.readline(LONGEST), b""), 1):
            record = _read_record(line)
            values = None if record is None else tuple(record.get(key) for key in keys)
            if values is None or not all(
                value is None or isinstance(value, str) for value in values
            ):
                raise DownloadError(
                    f"{file}, line {number}: expected a dictionary with text for "
                    f"{', '.join(map(repr, keys))}, found {line[:60]!r}"
                )
            yield values


def _read_record(line: bytes) -> dict[object, str | None] | None:
    try:
        record = ast.literal_eval(line.decode())
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
        return None
    return record if isinstance(record, dict) else None
