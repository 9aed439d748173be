"""The columns of a raw table: that they exist, and the ids in them as strings."""

from __future__ import annotations

from typing import Any

import narwhals.stable.v2 as nw

from sce_pipeline.interactions.errors import InteractionsError

ROW = "row"
"""The place of a row in its file, counted from 0; whoever reads the file adds it."""

MALFORMED = "malformed"
"""What is wrong with the record of a row that could not be read, null for others."""

MALFORMED_RECORD = "malformed_record"
"""The text of such a record, or the beginning of it."""

ADDED = (ROW, MALFORMED, MALFORMED_RECORD)
"""The columns that are no user's, but may be added to a table by whoever reads it."""

_LARGEST_EXACT = {True: 2.0**24, False: 2.0**53}
"""Up to where whole numbers next to each other stay apart, by whether floats have 32 bits."""

_SPELT_OUT = 1e15  # larger numbers are written with an exponent

WHITE_SPACE = (
    "\t\n\v\f\r \x85\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000"
)
"""All that Unicode calls so; what an engine strips without being told varies."""

# Searched for apart, without ^ and $: before which line breaks $ matches varies with the engine.
_UNREADABLE = "[\\x00-\\x1f\\x7f-\\x9f\ufffd]"  # control characters, and what replaces lost bytes
_VISIBLE = f"[^{WHITE_SPACE}]"

_TEXT_OF_BYTES = (
    "; make text of the bytes, in Polars with .cast(pl.String) where they are UTF-8, or else with "
    '.bin.encode("hex")'
)


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
            existing = ", ".join(repr(other) for other in names if other not in ADDED)
            raise InteractionsError(
                f"{table} has no column {name!r}, which {parameter} asks for; "
                f"its columns are: {existing}"
            )
    if ROW not in names:
        raise InteractionsError(
            f"{table} has no column {ROW!r} with the place of each row in its file, "
            f"by which equal timestamps are ordered"
        )


def require_values(frame: nw.LazyFrame[Any], name: str, table: str) -> None:
    """Check that a column has a value if it has no type, as that of a file without any.

    Raises:
        InteractionsError: It has none.
    """
    if frame.collect_schema()[name] != nw.Unknown:
        return
    if frame.filter(~nw.col(name).is_null()).head(1).collect().is_empty():
        raise InteractionsError(
            f"{table}: column {name!r} has no value at all; is another column meant?"
        )


def identifiers(frame: nw.LazyFrame[Any], name: str, table: str) -> nw.Expr:
    """Read a column of ids as strings: whole numbers without a decimal point, null where unusable.

    Null, NaN and blank are missing. Text with control characters, line breaks among them, is what
    quoting errors and damaged files leave, and floats that are infinite or beyond exact whole
    numbers may have been several ids: neither is an id. Any other string is one as it stands.

    Raises:
        InteractionsError: The column holds neither strings nor numbers, or nothing at all.
    """
    require_values(frame, name, table)
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
        is_readable = text.str.contains(_VISIBLE) & ~text.str.contains(_UNREADABLE)
        return nw.when(is_readable).then(text)
    remedy = _TEXT_OF_BYTES if dtype == nw.Binary else ""
    raise InteractionsError(
        f"{table}: column {name!r} has the type {dtype}; ids must be strings or numbers{remedy}"
    )


def titles(frame: nw.LazyFrame[Any], name: str, table: str) -> nw.Expr:
    """Read a column of titles as text, null where there is nothing to be seen.

    Raises:
        InteractionsError: The column holds neither text nor numbers: what else there is every
            engine spells in its own way, if at all.
    """
    dtype = frame.collect_schema()[name]
    is_empty = dtype == nw.Unknown  # what a column without any value has
    if not (dtype.is_numeric() or is_empty or dtype in (nw.String, nw.Categorical, nw.Enum)):
        raise InteractionsError(
            f"{table}: column {name!r} has the type {dtype}; titles must be text or numbers"
        )
    text = as_found(frame, name)
    return nw.when(text.str.strip_chars(WHITE_SPACE) != "").then(text)


def as_found(frame: nw.LazyFrame[Any], name: str) -> nw.Expr:
    """Show a column of ids as text, readable or not; null where a number is none."""
    column = nw.col(name)
    if frame.collect_schema()[name].is_float():
        return nw.when(~column.is_nan()).then(spell_float(column))
    return column.cast(nw.String)


def spell_float(number: nw.Expr) -> nw.Expr:
    """Write floats as text: whole and infinite ones alike on every engine, others as it does."""
    is_short = number.abs() < _SPELT_OUT
    whole = nw.when(is_short).then(number.floor()).otherwise(nw.lit(0.0)).cast(nw.Int64)
    infinite = nw.when(number > 0).then(nw.lit("inf")).otherwise(nw.lit("-inf"))
    return (
        nw.when(is_short & (number == whole))
        .then(nw.concat_str(whole.cast(nw.String), nw.lit(".0")))
        .when(~number.is_finite() & ~number.is_nan())
        .then(infinite)
        .otherwise(number.cast(nw.String))
    )
