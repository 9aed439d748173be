"""Moments in time as microseconds since 1970-01-01 UTC, out of whatever the log holds.

Numbers count seconds, milliseconds, microseconds or nanoseconds, the same for the whole column; a
number that tells another unit than the column's is none of its timestamps.
Text holds a number or an ISO 8601 date, with or without a time and a time zone, row by row.
"""

from __future__ import annotations

import math
from datetime import datetime, timedelta
from typing import Any, NamedTuple

import narwhals.stable.v2 as nw

from sce_pipeline.interactions.errors import InteractionsError

EPOCH = datetime(1970, 1, 1)
MICROSECOND = timedelta(microseconds=1)

_YEAR_1 = (datetime(1, 1, 1) - EPOCH) // MICROSECOND
_YEAR_9999 = (datetime(9999, 12, 31, 23, 59, 59, 999999) - EPOCH) // MICROSECOND

_DAYS_TO_EPOCH = EPOCH.toordinal()

_NUMBER = r"^[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?$"
_LEAP_YEAR = r"(?:[0-9][0-9](?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)"
_DAY = (
    r"(?:[0-9]{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])"
    r"|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    r"|02-(?:0[1-9]|1[0-9]|2[0-8]))"
    rf"|{_LEAP_YEAR}-02-29)"
)
_SECONDS = r"(?::[0-5][0-9](?:\.[0-9]+)?)?"
_UTC = r"(?: ?(?:Z|UTC))"
_OFFSET = r"(?: ?[+-](?:[01][0-9]|2[0-3])(?::?[0-5][0-9])?)"
_ISO = rf"^{_DAY}(?:[T ](?:[01][0-9]|2[0-3]):[0-5][0-9]{_SECONDS}(?:{_UTC}|{_OFFSET})?)?$"


class Unit(NamedTuple):
    """What a number counts: its name, microseconds in one, and the magnitude that tells it."""

    name: str
    microseconds: float
    at_least: float


_UNITS = (
    Unit("nanoseconds", 1e-3, 1e17),
    Unit("microseconds", 1.0, 1e14),
    Unit("milliseconds", 1e3, 1e11),
    Unit("seconds", 1e6, 0.0),
)

_LARGEST = _YEAR_9999 * 1e3
"""The last moment in the smallest unit."""

_TELLING = 1e8
"""From here on a number tells its unit: seconds of 1973 are milliseconds of January 1970."""


def unit_of(magnitude: float | None) -> Unit:
    """Tell the unit of numbers by their typical magnitude; a log without numbers has dates.

    1e11 is the year 1973 in milliseconds and the year 5138 in seconds.
    """
    if magnitude is None or math.isnan(magnitude):
        return Unit("dates", 1.0, math.inf)
    return next(unit for unit in _UNITS if magnitude >= unit.at_least)


def read_timestamps(log: nw.LazyFrame[Any], name: str) -> dict[str, nw.Expr]:
    """Read a column of timestamps as far as that goes without knowing the unit of its numbers.

    Returns:
        Expressions over the log. ``raw`` is what a row holds, as text; ``is_missing`` and
        ``is_date`` say what it is, ``number`` is null where there is none, and ``date`` counts
        microseconds, 0 where there is no date.

    Raises:
        InteractionsError: The column holds neither text, nor numbers, nor dates.
    """
    dtype = log.collect_schema()[name]
    column = nw.col(name)
    if dtype in (nw.String, nw.Categorical, nw.Enum):
        text = column.cast(nw.String).fill_null("").str.strip_chars()
        is_date = text.str.contains(_ISO)
        return {
            "raw": column.cast(nw.String),
            "is_missing": text == "",
            "number": _finite(nw.when(text.str.contains(_NUMBER)).then(text).cast(nw.Float64)),
            "is_date": is_date,
            "date": _iso_microseconds(is_date, text),
        }
    if dtype.is_numeric():
        number = column.cast(nw.Float64)
        return {
            "raw": column.cast(nw.String),
            "is_missing": number.is_null() | number.is_nan().fill_null(False),
            "number": _finite(number),
            "is_date": nw.lit(False),
            "date": nw.lit(0, nw.Int64),
        }
    if isinstance(dtype, nw.Datetime) and dtype.time_zone is not None:
        column = column.dt.convert_time_zone("UTC").dt.replace_time_zone(None)
    if dtype in (nw.Date, nw.Datetime):
        is_date = column.dt.year().is_between(1, 9999).fill_null(False)
        moment = nw.when(is_date).then(column).cast(nw.Datetime("us"))
        return {
            "raw": nw.when(~column.is_null()).then(
                nw.when(is_date)
                .then(moment.cast(nw.String))
                .otherwise(nw.lit("a date outside the years 1 to 9999"))
            ),
            "is_missing": column.is_null(),
            "number": nw.lit(None, nw.Float64),
            "is_date": is_date,
            "date": _since_epoch(moment).fill_null(0).cast(nw.Int64),
        }
    raise InteractionsError(
        f"The log: column {name!r} has the type {dtype}; timestamps must be numbers, dates or text"
    )


def to_microseconds(unit: Unit) -> dict[str, nw.Expr]:
    """Bring what :func:`read_timestamps` read to microseconds.

    Returns:
        Expressions over its columns: ``is_valid``, whether a row holds a moment between the years 1
        and 9999; ``microseconds``, 0 where it does not; and ``is_other_unit``, whether a number
        tells another unit and is a moment in that.
    """
    number = (nw.col("number") * unit.microseconds).round()
    date = nw.col("date")
    is_number = number.is_between(_YEAR_1, _YEAR_9999 + 1, closed="left").fill_null(False)
    is_date = nw.col("is_date") & date.is_between(_YEAR_1, _YEAR_9999)
    whole = nw.when(is_number).then(number).otherwise(nw.lit(0.0)).cast(nw.Int64)
    return {
        "is_valid": is_number | is_date,
        "microseconds": nw.when(is_date).then(date).otherwise(whole),
        "is_other_unit": _tells_other_unit(unit).fill_null(False),
    }


def _tells_other_unit(unit: Unit) -> nw.Expr:
    size = nw.col("number").abs()
    larger = [other.at_least for other in _UNITS if other.at_least > unit.at_least]
    is_smaller = (size >= _TELLING) & (size < unit.at_least)
    is_larger = (size >= min(larger, default=math.inf)) & (size <= _LARGEST)
    return is_smaller | is_larger


def to_datetime(microseconds: nw.Expr) -> nw.Expr:
    """The moment so many microseconds after 1970, in steps that every engine can add."""
    seconds = microseconds // 1_000_000
    days = seconds // 86_400
    return (
        nw.lit(EPOCH)
        + days * nw.lit(timedelta(days=1))
        + (seconds - days * 86_400) * nw.lit(timedelta(seconds=1))
        + (microseconds - seconds * 1_000_000) * nw.lit(MICROSECOND)
    )


def _finite(number: nw.Expr) -> nw.Expr:
    return nw.when(number.is_finite()).then(number)


def _iso_microseconds(is_date: nw.Expr, text: nw.Expr) -> nw.Expr:
    """Microseconds since 1970 UTC of a date like 2014-07-18T12:30:05.25+02:00, else 0."""
    text = nw.when(is_date).then(text).otherwise(nw.lit("1970-01-01"))
    day = text.str.slice(0, 10).str.to_datetime(format="%Y-%m-%d")
    hours, minutes = _number(text.str.slice(11, 2)), _number(text.str.slice(14, 2))
    rest = text.str.slice(16)  # after 2014-07-18T12:30
    seconds = _number(rest.str.replace_all(rf"(?:{_UTC}|{_OFFSET})$", "").str.replace_all(":", ""))
    offset = rest.str.replace_all(rf"^{_SECONDS}{_UTC}?", "").str.replace_all(r"[ :]", "")
    ahead = _number(offset.str.slice(1, 2)) * 60 + _number(offset.str.slice(3, 2))
    ahead = nw.when(offset.str.starts_with("-")).then(-ahead).otherwise(ahead)
    time = ((hours * 60 + minutes - ahead) * 60 + seconds) * 1_000_000
    return _since_epoch(day) + time.round().cast(nw.Int64)


def _number(digits: nw.Expr) -> nw.Expr:
    return nw.when(digits != "").then(digits).otherwise(nw.lit("0")).cast(nw.Float64)


def _since_epoch(moment: nw.Expr) -> nw.Expr:
    """Microseconds since 1970, out of the parts of a moment, which every engine can tell."""
    past = moment.dt.year().cast(nw.Int64) - 1  # whole years before
    days = past * 365 + past // 4 - past // 100 + past // 400 + moment.dt.ordinal_day()
    hours = (days - _DAYS_TO_EPOCH) * 24 + moment.dt.hour()
    seconds = (hours * 60 + moment.dt.minute()) * 60 + moment.dt.second()
    return seconds * 1_000_000 + moment.dt.microsecond()
