from __future__ import annotations

from datetime import date, datetime, timedelta, timezone
from decimal import Decimal

import narwhals.stable.v2 as nw
import polars as pl
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from interaction_logs import NOON, NOON_SECONDS, TEXTS

from sce_pipeline.interactions.cleaning import clean_interactions
from sce_pipeline.interactions.errors import InteractionsError
from sce_pipeline.parameters import Columns

COLUMNS = Columns(user="who", item="what", timestamp="when")


def clean_all(**columns):
    length = max(len(values) for values in columns.values() if not isinstance(values, str))
    defaults = {"who": ["u"] * length, "what": ["i"] * length, "when": [NOON_SECONDS] * length}
    frame = pl.LazyFrame(defaults | columns | {"row": range(length)})
    cleaned, rejected, report = clean_interactions(nw.from_native(frame), COLUMNS)
    tables = (frame.collect(backend="polars").to_native() for frame in (cleaned, rejected))
    return *tables, report


def clean(**columns):
    cleaned, _, report = clean_all(**columns)
    return cleaned, report


def read_times(values):
    """What each timestamp is read as, None for rows that are dropped."""
    cleaned, _ = clean(when=values)
    times = dict(zip(cleaned["row"], cleaned["timestamp"], strict=True))
    return [times.get(row) for row in range(len(values))]


def test_the_columns_and_types_are_those_of_the_contract():
    cleaned, report = clean(who=["b", "a"], what=["x", "y"], when=["1", "2"], other=["?", "?"])
    assert dict(cleaned.schema) == {
        "user": pl.String,
        "item": pl.String,
        "timestamp": pl.Datetime("us"),
        "row": pl.Int64,
    }
    assert cleaned.rows() == [
        ("b", "x", datetime(1970, 1, 1, 0, 0, 1), 0),
        ("a", "y", datetime(1970, 1, 1, 0, 0, 2), 1),
    ]
    assert report == {
        "raw": {"rows": 2, "users": 2, "items": 2},
        "kept": {"rows": 2, "users": 2, "items": 2},
        "dropped": {},
        "doubtful": {},
        "timestamp_unit": "seconds",
        "first_timestamp": "1970-01-01T00:00:01",
        "last_timestamp": "1970-01-01T00:00:02",
    }


@pytest.mark.parametrize(
    ("values", "ids"),
    [
        (["a", "07", " b", "1.0"], ["a", "07", " b", "1.0"]),
        (pl.Series([7, 2**62], dtype=pl.Int64), ["7", str(2**62)]),
        (pl.Series([7.0, -1.0, 1.5, 2.0**53]), ["7", "-1", "1.5", "9007199254740992"]),
        (pl.Series([Decimal("7.00"), Decimal("10.00")]), ["7", "10"]),
        (pl.Series(["a", "b"], dtype=pl.Categorical), ["a", "b"]),
    ],
)
def test_ids_are_kept_as_they_stand_and_whole_numbers_lose_their_point(values, ids):
    cleaned, _ = clean(who=values)
    assert cleaned["user"].to_list() == ids


@pytest.mark.parametrize(
    ("unit", "scale"),
    [("seconds", 1), ("milliseconds", 10**3), ("microseconds", 10**6), ("nanoseconds", 10**9)],
)
@pytest.mark.parametrize("as_text", [True, False])
def test_the_unit_of_numbers_is_told_by_the_whole_column(unit, scale, as_text):
    # 0 and the outlier are no reason to read the other values otherwise.
    numbers = [NOON_SECONDS * scale, (NOON_SECONDS + 1) * scale, 0, NOON_SECONDS * scale, 10**18]
    cleaned, report = clean(when=[str(number) for number in numbers] if as_text else numbers)
    assert report["timestamp_unit"] == unit
    assert cleaned["timestamp"].to_list()[:4] == [
        NOON,
        NOON + timedelta(seconds=1),
        datetime(1970, 1, 1),
        NOON,
    ]


@pytest.mark.parametrize(("text", "moment"), TEXTS)
def test_text_is_read_row_by_row(text, moment):
    seconds = str(NOON_SECONDS)
    assert read_times([seconds, seconds, text, "2014-07-18T12:30:05"]) == [NOON, NOON, moment, NOON]


def read_by_the_standard_library(text):
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        return moment
    try:
        return moment.astimezone(timezone.utc).replace(tzinfo=None)
    except OverflowError:  # a zone that leads out of the years 1 to 9999
        return None


offsets = st.integers(-23 * 60, 23 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes)))
iso_dates = st.builds(
    datetime.isoformat,
    st.datetimes(timezones=st.none() | offsets),
    st.sampled_from(["T", " "]),
)


@settings(max_examples=15)
@given(st.lists(iso_dates, min_size=5, max_size=50))
@example(["9999-12-31T23:59:59.999999", "9999-12-31T23:59:59-00:01", "0001-01-01T00:00+00:01"])
def test_iso_dates_are_read_as_the_standard_library_reads_them(texts):
    expected = [read_by_the_standard_library(text) for text in texts]
    assert read_times(["0", *texts])[1:] == expected


@pytest.mark.parametrize(
    ("series", "moments"),
    [
        (pl.Series([date(2014, 7, 18), None]), [datetime(2014, 7, 18), None]),
        (pl.Series([NOON, None], dtype=pl.Datetime("ms")), [NOON, None]),
        (pl.Series([NOON, None], dtype=pl.Datetime("ns")), [NOON, None]),
        (
            pl.Series([NOON, None]).dt.replace_time_zone("Asia/Tokyo"),
            [NOON - timedelta(hours=9), None],
        ),
        (
            pl.Series([0, 2**61, -(2**61)]).cast(pl.Datetime("ms")),
            [datetime(1970, 1, 1), None, None],
        ),
        (pl.Series([0, 2**31 - 1], dtype=pl.Int32).cast(pl.Date), [datetime(1970, 1, 1), None]),
        (pl.Series([NOON_SECONDS + 0.25]), [NOON + timedelta(seconds=0.25)]),
        (
            pl.Series([float(NOON_SECONDS), float("nan"), float("inf"), None]),
            [NOON, None, None, None],
        ),
        (pl.Series([Decimal(NOON_SECONDS)]), [NOON]),
    ],
)
def test_typed_columns_are_read_in_any_unit_and_time_zone(series, moments):
    assert read_times(series) == moments


def test_rows_are_dropped_for_the_first_reason_and_counted():
    cleaned, report = clean(
        who=["a", None, "", "b", "  ", "b", "b", "c"],
        what=["x", "x", "x", None, None, "y", "z", "z"],
        when=["1", "1", "1", "1", None, None, "soon", "later"],
    )
    assert cleaned["row"].to_list() == [0]
    assert report["raw"] == {"rows": 8, "users": 3, "items": 3}
    assert report["kept"] == {"rows": 1, "users": 1, "items": 1}
    assert report["dropped"] == {
        "missing user": {"rows": 3, "first_data_row": 2},
        "missing item": {"rows": 1, "first_data_row": 4},
        "missing timestamp": {"rows": 1, "first_data_row": 6},
        "unparseable timestamp": {"rows": 2, "first_data_row": 7, "example": "soon"},
    }


def test_nan_is_a_missing_id():
    _, report = clean(who=pl.Series([1.0, float("nan"), None]))
    assert report["dropped"] == {"missing user": {"rows": 2, "first_data_row": 2}}


@pytest.mark.parametrize(
    ("unit", "in_unit", "in_another"),
    [
        (1, [0, 1, -1, 10**11 - 1, -(10**10)], [10**11, -(10**11), 10**14, 2 * 10**20]),
        (10**3, [0, 10**8 - 1, 10**11, 10**14 - 1], [10**8, -(10**8), 10**11 - 1, 10**14, 10**17]),
        (10**6, [0, 10**8 - 1, 10**14, 10**17 - 100], [10**8, 10**14 - 1, 10**17, 10**20]),
        (10**9, [0, 10**8 - 1, 10**17, 10**20], [10**8, 10**14, 10**17 - 100, -(10**14)]),
    ],
)
def test_a_number_that_tells_another_unit_is_none_of_the_columns(unit, in_unit, in_another):
    numbers = [NOON_SECONDS * unit] * 10 + in_unit + in_another
    _, rejected, report = clean_all(when=[str(number) for number in numbers])
    assert rejected["timestamp"].to_list() == [str(number) for number in in_another]
    assert set(rejected["reason"]) == {"other-unit timestamp"}
    assert report["dropped"]["other-unit timestamp"] == {
        "rows": len(in_another),
        "first_data_row": 11 + len(in_unit),
        "example": str(in_another[0]),
    }


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        ({"who": ["a", "b\n"]}, ("b\n", "i", str(NOON_SECONDS), "unreadable user")),
        ({"what": ["a", "\x00"]}, ("u", "\x00", str(NOON_SECONDS), "unreadable item")),
        ({"what": ["a", "b\x85"]}, ("u", "b\x85", str(NOON_SECONDS), "unreadable item")),
        ({"what": ["a", "\u2003 "]}, ("u", "\u2003 ", str(NOON_SECONDS), "missing item")),
        ({"who": [1.0, float("-inf")]}, ("-inf", "i", str(NOON_SECONDS), "unreadable user")),
        ({"who": [1.0, None]}, (None, "i", str(NOON_SECONDS), "missing user")),
        (
            {"who": pl.Series([1.0, 2.0**24 + 2], dtype=pl.Float32)},
            ("16777218.0", "i", str(NOON_SECONDS), "unreadable user"),
        ),
        (
            {"who": ["a", None], "when": [NOON, NOON]},
            (None, "i", "2014-07-18 12:30:05.000000", "missing user"),
        ),
        (
            {"when": pl.Series([0, 2**61]).cast(pl.Datetime("ms"))},
            ("u", "i", "a date outside the years 1 to 9999", "unparseable timestamp"),
        ),
        ({"when": [" 5 ", " soon "]}, ("u", "i", " soon ", "unparseable timestamp")),
    ],
)
def test_a_row_is_set_aside_with_what_it_holds(columns, found):
    cleaned, rejected, report = clean_all(**columns)
    assert cleaned["row"].to_list() == [0]
    assert rejected.rows() == [(2, *found, None)]
    assert list(report["dropped"]) == [found[-1]]


def test_what_is_set_aside_is_shown_in_part_and_kept_whole():
    long = "x\n" * 1_000_000
    _, rejected, report = clean_all(who=["a", long])
    assert rejected["user"].item() == long
    assert report["dropped"]["unreadable user"]["example"] == long[:200]


def test_doubtful_values_are_kept_and_counted():
    cleaned, report = clean(
        who=["a", " a", "nan", "b", "b", "NAN"],
        what=["x", "x\u00a0", "NULL", "y", "nano", "None"],
        when=["1", "2", "3", "0", "0.0", "2014-07-18"],
    )
    assert len(cleaned) == 6
    assert report["doubtful"] == {
        "space around an id": 1,
        "id that says it is missing": 2,
        "timestamp of exactly 0": 2,
    }


def test_line_breaks_in_other_columns_are_doubtful_in_text_alone():
    _, text = clean(when=["1", "2", "3"], note=["a\nb", None, "c"])
    _, typed = clean(when=[1, 2, 3], note=["a\nb", None, "c"])
    assert list(text["doubtful"].values()) == [1]
    assert "line break in another column" in next(iter(text["doubtful"]))
    assert typed["doubtful"] == {}


@settings(max_examples=25)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a", "", None]),
            st.sampled_from(["x", "", None]),
            st.sampled_from(["1", "2014-07-18", "soon", "", None]),
        ),
        max_size=12,
    )
)
def test_every_row_is_kept_or_counted_as_dropped(rows):
    rows = [("a", "x", "1"), *rows]
    who, what, when = zip(*rows, strict=True)
    cleaned, report = clean(who=list(who), what=list(what), when=list(when))
    assert report["kept"]["rows"] == len(cleaned)
    assert len(cleaned) + sum(loss["rows"] for loss in report["dropped"].values()) == len(rows)
    usable = [bool(u) and bool(i) and t in ("1", "2014-07-18") for u, i, t in rows]
    assert cleaned["row"].to_list() == [row for row, is_usable in enumerate(usable) if is_usable]


def test_a_missing_column_is_named_with_those_that_exist():
    frame = nw.from_native(pl.LazyFrame({"who": ["a"], "item": ["x"], "when": [1], "row": [0]}))
    message = (
        r"no column 'what', which data_processing.columns.item asks for; .*: 'who', 'item', 'when'$"
    )
    with pytest.raises(InteractionsError, match=message):
        clean_interactions(frame, COLUMNS)


def test_a_log_without_the_place_of_its_rows_is_refused():
    frame = nw.from_native(pl.LazyFrame({"who": ["a"], "what": ["x"], "when": [1]}))
    with pytest.raises(InteractionsError, match="no column 'row'"):
        clean_interactions(frame, COLUMNS)


@pytest.mark.parametrize("column", ["who", "what", "when"])
@pytest.mark.parametrize("values", [[True], [[1]], [timedelta(1)]])
def test_a_column_without_meaning_is_refused(column, values):
    with pytest.raises(InteractionsError, match=f"column '{column}' has the type"):
        clean(**{column: values})


def test_ids_of_bytes_are_refused_with_what_to_do():
    with pytest.raises(
        InteractionsError, match=r"type Binary; .*\.cast\(pl\.String\) where .*UTF-8"
    ):
        clean(who=[b"u1"])


@pytest.mark.parametrize("column", ["who", "what", "when"])
def test_a_column_without_type_or_value_is_said_to_have_no_value(column):
    message = f"^The log: column '{column}' has no value at all; is another column meant"
    with pytest.raises(InteractionsError, match=message):
        clean(**{column: [None, None]})


def test_an_unusable_log_shows_its_first_bad_value():
    message = (
        r"None of the 3 rows .* 2 with missing user \(column 'who', first in data row 2\); "
        r"1 with unparseable timestamp \(column 'when', first in data row 1: 'soon'\)"
    )
    with pytest.raises(InteractionsError, match=message):
        clean(who=["a", "", None], when=["soon", "1", "1"])


def test_a_log_without_rows_is_refused():
    with pytest.raises(InteractionsError, match="has no rows"):
        clean(**dict.fromkeys(("who", "what", "when"), pl.Series([], dtype=pl.String)))
