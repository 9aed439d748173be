"""The columns of a raw table: that they exist, and the ids in them as strings."""

from __future__ import annotations

from typing import Any

import narwhals.stable.v2 as nw

from sce_pipeline.interactions.errors import InteractionsError

ROW = "row"
"""The place of a row in its file, counted from 0; whoever reads the file adds it."""

_LARGEST_WHOLE_FLOAT = 2.0**63


def require_columns(frame: nw.LazyFrame[Any], roles: dict[str, str], table: str) -> None:
    """Check that a table has the columns it is said to have.

    Args:
        frame: The table.
        roles: For each parameter, the name of the column that it asks for.
        table: What to call the table in an error.

    Raises:
        InteractionsError: A column is missing.
    """
    names = frame.collect_schema().names()
    for parameter, name in roles.items():
        if name not in names:
            existing = ", ".join(repr(other) for other in names if other != ROW)
            raise InteractionsError(
                f"{table} has no column {name!r}, which {parameter} asks for; "
                f"its columns are: {existing}"
            )
    if ROW not in names:
        raise InteractionsError(
            f"{table} has no column {ROW!r} with the place of each row in its file, "
            f"by which equal timestamps are ordered"
        )


def identifiers(frame: nw.LazyFrame[Any], name: str, table: str) -> nw.Expr:
    """Read a column of ids as strings: whole numbers without a decimal point, null where missing.

    Missing is null, NaN or blank. Any other string is an id as it stands.

    Raises:
        InteractionsError: The column holds neither strings nor numbers.
    """
    dtype = frame.collect_schema()[name]
    column = nw.col(name)
    if dtype.is_float():
        is_whole = (column.abs() < _LARGEST_WHOLE_FLOAT) & (column == column.floor())
        whole = nw.when(is_whole).then(column).otherwise(nw.lit(0.0)).cast(nw.Int64)
        text = nw.when(is_whole).then(whole.cast(nw.String)).otherwise(column.cast(nw.String))
        return nw.when(~column.is_nan()).then(text)
    if dtype.is_decimal():
        return column.cast(nw.String).str.replace_all(r"\.0+$", "")
    if dtype.is_integer():
        return column.cast(nw.String)
    if dtype in (nw.String, nw.Categorical, nw.Enum):
        text = column.cast(nw.String)
        return nw.when(text.str.strip_chars() != "").then(text)
    raise InteractionsError(
        f"{table}: column {name!r} has the type {dtype}; ids must be strings or numbers"
    )
