"""Moments in time as microseconds since 1970-01-01 UTC, out of whatever the log holds.

Numbers count seconds, milliseconds, microseconds or nanoseconds, the same for the whole column; a
number that tells another unit than the column's is none of its timestamps.
Text holds a number or an ISO 8601 date, with or without a time and a time zone, row by row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any, NamedTuple

import narwhals.stable.v2 as nw

from sce_pipeline.interactions.columns import WHITE_SPACE, spell_float
from sce_pipeline.interactions.errors import InteractionsError

EPOCH = datetime(1970, 1, 1)
MICROSECOND = timedelta(microseconds=1)

_YEAR_1 = (datetime(1, 1, 1) - EPOCH) // MICROSECOND
_YEAR_9999 = (datetime(9999, 12, 31, 23, 59, 59, 999999) - EPOCH) // MICROSECOND

_DAYS_TO_EPOCH = EPOCH.toordinal()

_NAMES_OF_UTC = ("UTC", "Etc/UTC")

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


def reach_units(number: nw.Expr) -> dict[str, nw.Expr]:
    """Count the numbers that are large enough for each unit."""
    return {unit.name: (number.abs() >= unit.at_least).cast(nw.Int64).sum() for unit in _UNITS}


def unit_of(counted: Mapping[str, Any]) -> Unit:
    """Tell the unit of numbers by what half of them reach; a log without numbers has dates.

    1e11 is the year 1973 in milliseconds and the year 5138 in seconds.

    Args:
        counted: The ``numbers``, and how many of them ``reach_units``.
    """
    if not counted["numbers"]:
        return Unit("dates", 1.0, math.inf)
    return next(unit for unit in _UNITS if 2 * counted[unit.name] >= counted["numbers"])


def read_timestamps(log: nw.LazyFrame[Any], column: str, name: str) -> nw.LazyFrame[Any]:
    """Read a column of timestamps as far as that goes without knowing the unit of its numbers.

    It goes in steps, each a column: engines that write expressions out, as Spark does, would have
    one for each mention of the text.

    Args:
        log: Any columns but those added here.
        column: The timestamps.
        name: What the file calls them, for errors.

    Returns:
        The log with others in place of the column. ``raw`` is what a row holds, as text;
        ``is_missing`` and ``is_date`` say what it is, ``number`` is null where there is none, and
        ``date`` counts microseconds, 0 where there is no date.

    Raises:
        InteractionsError: The column holds neither text, nor numbers, nor dates.
    """
    others = [other for other in log.collect_schema().names() if other != column]
    found = ("raw", "is_missing", "number", "is_date", "date")
    return _read(log, column, name).select(*others, *found)


def _read(log: nw.LazyFrame[Any], column: str, name: str) -> nw.LazyFrame[Any]:
    dtype = log.collect_schema()[column]
    found = nw.col(column)
    if dtype in (nw.String, nw.Categorical, nw.Enum):
        return _read_text(log.with_columns(raw=found.cast(nw.String)))
    if dtype.is_numeric():
        # Divided, since PyArrow casts no whole number that a float does not hold exactly.
        number = (found / 1 if dtype.is_integer() else found).cast(nw.Float64)
        is_missing = number.is_null() | number.is_nan().fill_null(False)
        text = spell_float(found) if dtype.is_float() else found.cast(nw.String)
        return log.with_columns(
            raw=nw.when(~is_missing).then(text),
            is_missing=is_missing,
            number=_finite(number),
            is_date=nw.lit(False),
            date=nw.lit(0, nw.Int64),
        )
    if isinstance(dtype, nw.Datetime) and dtype.time_zone is not None:
        if dtype.time_zone not in _NAMES_OF_UTC:  # which is not a change that DuckDB can make
            found = found.dt.convert_time_zone("UTC")
        found = found.dt.replace_time_zone(None)
    if dtype in (nw.Date, nw.Datetime):
        return _read_moments(log.with_columns(moment=found))
    raise InteractionsError(
        f"The log: column {name!r} has the type {dtype}; timestamps must be numbers, dates or text"
    )


def _read_moments(log: nw.LazyFrame[Any]) -> nw.LazyFrame[Any]:
    """Read the column ``moment``, a date or a time without a time zone."""
    moment, is_date = nw.col("moment"), nw.col("is_date")
    log = log.with_columns(
        is_missing=moment.is_null(),
        is_date=moment.dt.year().is_between(1, 9999).fill_null(False),
    )
    log = log.with_columns(
        moment=nw.when(is_date).then(moment).cast(nw.Datetime("us")).fill_null(_epoch())
    )
    outside = nw.lit("a date outside the years 1 to 9999")
    return log.with_columns(
        raw=nw.when(~nw.col("is_missing")).then(
            nw.when(is_date).then(_spell_moment(moment)).otherwise(outside)
        ),
        number=nw.lit(None, nw.Float64),
        date=since_epoch(moment).cast(nw.Int64),
    )


def to_microseconds(log: nw.LazyFrame[Any], unit: Unit) -> nw.LazyFrame[Any]:
    """Bring what :func:`read_timestamps` read to microseconds.

    Returns:
        The log with more columns: ``is_valid``, whether a row holds a moment between the years 1
        and 9999; ``microseconds``, without meaning where it does not; and ``is_other_unit``,
        whether a number tells another unit and is a moment in that.
    """
    number, date = nw.col("number") * unit.microseconds, nw.col("date")
    is_number, is_date, whole = nw.col("is_number"), nw.col("is_date"), nw.col("whole")
    is_near = number.is_between(_YEAR_1 - 1, _YEAR_9999 + 1).fill_null(False)
    log = log.with_columns(
        is_number=is_near,
        whole=_round(nw.when(is_near).then(number).otherwise(nw.lit(0.0))),
        is_date=is_date & date.is_between(_YEAR_1, _YEAR_9999),
    )
    return log.with_columns(
        is_valid=is_date | (is_number & whole.is_between(_YEAR_1, _YEAR_9999)),
        microseconds=nw.when(is_date).then(date).otherwise(whole),
        is_other_unit=_tells_other_unit(unit).fill_null(False),
    )


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
        _epoch()
        + days * nw.lit(timedelta(days=1))
        + (seconds - days * 86_400) * nw.lit(timedelta(seconds=1))
        + (microseconds - seconds * 1_000_000) * nw.lit(MICROSECOND)
    )


def _epoch() -> nw.Expr:
    return nw.lit(EPOCH.date()).cast(nw.Datetime("us"))  # a literal with a time may have a zone


def at(moment: datetime) -> nw.Expr:
    """A moment as a literal, the same one on every engine."""
    return to_datetime(nw.lit((moment - EPOCH) // MICROSECOND, nw.Int64))


def _finite(number: nw.Expr) -> nw.Expr:
    return nw.when(number.is_finite()).then(number)


def _round(number: nw.Expr) -> nw.Expr:
    """Round to the nearest whole number (Int64), halves to the even one; engines differ in that."""
    down = number.floor()
    above = number - down
    is_odd = (down / 2).floor() * 2 != down  # PyArrow knows no remainder
    is_up = (above > 0.5) | ((above == 0.5) & is_odd)  # noqa: PLR2004
    return nw.when(is_up).then(down + 1).otherwise(down).cast(nw.Int64)


def _read_text(log: nw.LazyFrame[Any]) -> nw.LazyFrame[Any]:
    """Read the column ``raw``: numbers, and dates like 2014-07-18T12:30:05.25+02:00."""
    text, iso, rest, offset = (nw.col(name) for name in ("text", "iso", "rest", "offset"))
    log = log.with_columns(text=nw.col("raw").fill_null("").str.strip_chars(WHITE_SPACE))
    log = log.with_columns(
        is_missing=text == "",
        number=nw.when(text.str.contains(_NUMBER)).then(text).cast(nw.Float64),
        is_date=text.str.contains(_ISO) & ~text.str.starts_with("0000"),
    )
    log = log.with_columns(
        number=_finite(nw.col("number")),
        iso=nw.when(nw.col("is_date")).then(text).otherwise(nw.lit("1970-01-01")),
    )
    log = log.with_columns(
        day=iso.str.slice(0, 10).str.to_datetime(format="%Y-%m-%d"),
        hours=_number(iso.str.slice(11, 2)),
        minutes=_number(iso.str.slice(14, 2)),
        rest=iso.str.slice(16),  # after 2014-07-18T12:30
    )
    log = log.with_columns(
        seconds=rest.str.replace_all(rf"(?:{_UTC}|{_OFFSET})$", "").str.replace_all(":", ""),
        offset=rest.str.replace_all(rf"^{_SECONDS}{_UTC}?", "").str.replace_all(r"[ :]", ""),
    )
    log = log.with_columns(
        seconds=_number(nw.col("seconds")),
        ahead=_number(offset.str.slice(1, 2)) * 60 + _number(offset.str.slice(3, 2)),
    )
    ahead = nw.when(offset.str.starts_with("-")).then(-nw.col("ahead")).otherwise(nw.col("ahead"))
    minutes = nw.col("hours") * 60 + nw.col("minutes") - ahead
    log = log.with_columns(time=(minutes * 60 + nw.col("seconds")) * 1_000_000)
    return log.with_columns(date=since_epoch(nw.col("day")) + _round(nw.col("time")))


def _number(digits: nw.Expr) -> nw.Expr:
    return nw.when(digits != "").then(digits).otherwise(nw.lit("0")).cast(nw.Float64)


def _microsecond(moment: nw.Expr) -> nw.Expr:
    found = moment.dt.microsecond()  # Spark counts those before 1970 down from 0
    return nw.when(found < 0).then(found + 1_000_000).otherwise(found)


def _spell_moment(moment: nw.Expr) -> nw.Expr:
    fraction = _microsecond(moment).cast(nw.String).str.zfill(6)
    seconds = moment.dt.to_string("%Y-%m-%d %H:%M:%S").str.slice(0, 19)  # PyArrow adds a fraction
    return nw.concat_str(seconds, nw.lit("."), fraction)


def since_epoch(moment: nw.Expr) -> nw.Expr:
    """Microseconds since 1970, out of the parts of a moment, which every engine can tell."""
    past = moment.dt.year().cast(nw.Int64) - 1  # whole years before
    days = past * 365 + past // 4 - past // 100 + past // 400 + moment.dt.ordinal_day()
    hours = (days - _DAYS_TO_EPOCH) * 24 + moment.dt.hour()
    seconds = (hours * 60 + moment.dt.minute()) * 60 + moment.dt.second()
    return seconds * 1_000_000 + _microsecond(moment)
