"""Parquet files that fill the memory, told by what stands at their end."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

MOST_ROWS = 2**27
"""Most rows of a row group, which is read as a whole; those who write Parquet stay far below."""

MOST_BYTES = 2**31
"""Most bytes that a column of a row group may unpack to."""

LONG_VALUE = 2**16
"""Bytes a value that no id and no time has on average."""

LONG_VALUES = 2**24
"""Bytes from which on long values matter."""


def find_bomb(file: Path) -> str | None:
    """Say what is wrong with the first row group that is too large to be read, if there is one.

    Only the end of the file is looked at. What is no Parquet file, or is damaged, is for whoever
    reads it to tell.
    """
    try:
        metadata = parquet.read_metadata(file)
    except (pa.ArrowException, OSError):
        return None
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        where = f"row group {number}, counted from 0,"
        if group.num_rows > MOST_ROWS:
            return f"{where} has {group.num_rows:,} rows, more than {MOST_ROWS:,}"
        for place in range(group.num_columns):
            column = group.column(place)
            size, name = column.total_uncompressed_size, column.path_in_schema
            if size > MOST_BYTES:
                return (
                    f"{where} has {size:,} bytes in the column {name!r}, more than {MOST_BYTES:,}"
                )
            if size >= LONG_VALUES and size >= LONG_VALUE * column.num_values:
                average = size // max(1, column.num_values)
                return f"{where} has {average:,} bytes a value in the column {name!r}"
    return None
