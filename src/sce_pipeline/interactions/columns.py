"""The columns of a raw table: that they exist, and the ids in them as strings."""

from __future__ import annotations

from typing import Any

import narwhals.stable.v2 as nw

from sce_pipeline.interactions.errors import InteractionsError

ROW = "row"
"""The place of a row in its file, counted from 0; whoever reads the file adds it."""

_LARGEST_EXACT = {True: 2.0**24, False: 2.0**53}
"""Up to where whole numbers next to each other stay apart, by whether floats have 32 bits."""

_UNREADABLE = "\\x00-\\x1f\\x7f-\\x9f\ufffd"  # control characters, and what replaces lost bytes
_BLANK = "\\s\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_READABLE = f"^[^{_UNREADABLE}]*[^{_UNREADABLE}{_BLANK}][^{_UNREADABLE}]*$"


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
    """Read a column of ids as strings: whole numbers without a decimal point, null where unusable.

    Null, NaN and blank are missing. Text with control characters, line breaks among them, is what
    quoting errors and damaged files leave, and floats that are infinite or beyond exact whole
    numbers may have been several ids: neither is an id. Any other string is one as it stands.

    Raises:
        InteractionsError: The column holds neither strings nor numbers.
    """
    dtype = frame.collect_schema()[name]
    column = nw.col(name)
    if dtype.is_float():
        is_exact = column.abs() <= _LARGEST_EXACT[dtype == nw.Float32]
        is_whole = is_exact & (column == column.floor())
        whole = nw.when(is_whole).then(column).otherwise(nw.lit(0.0)).cast(nw.Int64)
        text = nw.when(is_whole).then(whole.cast(nw.String)).otherwise(column.cast(nw.String))
        return nw.when(is_exact & ~column.is_nan()).then(text)
    if dtype.is_decimal():
        return column.cast(nw.String).str.replace_all(r"\.0+$", "")
    if dtype.is_integer():
        return column.cast(nw.String)
    if dtype in (nw.String, nw.Categorical, nw.Enum):
        text = column.cast(nw.String)
        # In Python's dialect $ also matches before a line break at the end.
        is_readable = text.str.contains(_READABLE) & ~text.str.ends_with("\n")
        return nw.when(is_readable).then(text)
    raise InteractionsError(
        f"{table}: column {name!r} has the type {dtype}; ids must be strings or numbers"
    )


def as_found(frame: nw.LazyFrame[Any], name: str) -> nw.Expr:
    """Show a column of ids as text, readable or not; null where a number is none."""
    column = nw.col(name)
    text = column.cast(nw.String)
    return nw.when(~column.is_nan()).then(text) if frame.collect_schema()[name].is_float() else text
