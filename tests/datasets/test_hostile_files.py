"""Files as nobody should send them: refused with a reason, or every row of them accounted for."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import narwhals.stable.v2 as nw
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from kedro.io import DatasetError
from reference_csv import read_records

from sce_pipeline.datasets.raw_table import RawTableDataset
from sce_pipeline.interactions.cleaning import clean_interactions
from sce_pipeline.interactions.errors import InteractionsError
from sce_pipeline.parameters import Columns

CORPUS = Path(__file__).parent / "hostile"
COLUMNS = Columns(user="userid", item="itemid", timestamp="timestamp")


def read_and_clean(folder):
    """Return rows kept and rows set aside, as tuples, and the report."""
    table = RawTableDataset(filepath=str(folder / "interactions"), set_aside_malformed=True).load()
    kept, rejected, report = clean_interactions(nw.from_native(table), COLUMNS)
    kept = kept.to_native().collect().select("row", "user", "item", "timestamp")
    rejected = rejected.to_native().collect()
    assert rejected.columns == ["data_row", "user", "item", "timestamp", "reason", "record"]
    places = sorted(kept["row"].to_list() + [row - 1 for row in rejected["data_row"]])
    assert places == list(range(report["raw"]["rows"]))
    return kept.rows(), rejected.rows(), report


MALFORMED = {
    "comment_before_header.csv": r"line 2, after column '# exported': expected 1 values, found 3",
    "latin_1.csv": r"line 3, column 'userid': 'caf\\xe9' is not UTF-8 \(byte 4 of it is 0xe9\)",
    "latin_1_in_another_column.csv": (
        r"'title': 'caf\\xe9' is not UTF-8 .* from the encoding .* iconv -f <encoding> -t utf-8"
    ),
    "quote_after_quote.csv": r"line 3, column 'userid': '\"u1\"x' has a quote that is not closed",
    "quote_not_closed.csv": r"line 3, column 'itemid': '\"i1' has a quote that is not closed",
    "quote_within.csv": r"line 3, column 'itemid': 'i\"1' has a quote that is not closed",
    "too_many_values.csv": r"line 3, after column 'timestamp': expected 3 values, found 4, .* 'x'",
}
"""What the error says of each malformed file where such records are not set aside."""

REFUSED = {
    "comment_before_header.csv": r"no column 'userid', .*; its columns are: '# exported'$",
    "latin_1_in_another_column.csv": "None of the 1 rows of the log can be used: 1 with bytes that "
    r"are not UTF-8 in record \(first in data row 1: 'u0,i0,1405686605,caf\ufffd'\)\. .* "
    "Where bytes are not UTF-8, convert the file from the encoding it was written in",
    "bomb_in_one_line.csv.gz": "line . begins a record of 16,777,216 bytes or more, which no",
    "carriage_returns_alone.csv": "is not comma-separated text",
    "damaged.parquet": "Cannot read",
    "empty.csv": "empty CSV",
    "empty.parquet": "Cannot read",
    "gzipped_twice.csv.gz": "is not comma-separated text",
    "header_only.csv": "has columns but no rows: userid, itemid, timestamp",
    "header_with_a_quote.csv": r"line 1, column 'no.* has a quote that is not closed",
    "list_of_ids.parquet": r"column 'itemid' has the type List\(String\); ids must be",
    "missing_column.csv": r"no column 'timestamp', .*; its columns are: 'userid', 'itemid'",
    "no_gzip_after_all.csv.gz": "Cannot read",
    "nothing_usable.csv": r"None of the 2 rows .* first in data row 1: 'yesterday'",
    "semicolons.csv": "must be separated by commas",
    "struct_of_ids.parquet": r"column 'userid' has the type Struct",
    "trailing_garbage.csv.gz": "Cannot read",
    "truncated.csv.gz": "Cannot read",
    "truncated.parquet": "Cannot read",
    "two_columns_of_one_name.csv": "has the column 'userid' more than once",
    "utf_16.csv": "is text in UTF-16, expected UTF-8",
    "utf_16_without_mark.csv": "is text in UTF-16LE, expected UTF-8",
    "wrong_checksum.csv.gz": "Cannot read",
    "zstd.csv": "is compressed with zstd, expected text or gzip",
}
"""What the error says about each file that is refused."""

SPACE = "space around an id"
SAYS_MISSING = "id that says it is missing"
ZERO = "timestamp of exactly 0"
LINE_BREAK = "line break in another column, where a misplaced quote may hide rows"

READ = {
    "byte_order_mark.csv": (2, {}, {}),
    "dates_and_decimals.parquet": (2, {"missing user": 1}, {}),
    "empty_lines.csv": (2, {"missing user": 2}, {}),
    "far_future.csv": (3, {"other-unit timestamp": 1, "unparseable timestamp": 1}, {}),
    "floats_beyond_exact.parquet": (2, {"unreadable user": 3, "missing user": 1}, {}),
    "formulas.csv": (4, {}, {}),
    "gzipped_in_parts.csv.gz": (4, {}, {}),
    "gzipped_without_saying.csv": (2, {}, {}),
    "latin_1.csv": (2, {"bytes that are not UTF-8 in record": 1}, {}),
    "line_break_in_another_column.csv": (2, {}, {LINE_BREAK: 1}),
    "line_break_in_id.csv": (2, {"unreadable item": 1}, {}),
    "long_ids.csv": (2, {}, {}),
    "mixed_types.csv": (3, {"unparseable timestamp": 2}, {}),
    "mixed_units.csv": (4, {"other-unit timestamp": 3}, {}),
    "names_of_nothing.csv": (4, {}, {SAYS_MISSING: 3}),
    "negative_and_zero.csv": (3, {}, {ZERO: 1}),
    "nul_bytes.csv": (2, {"unreadable user": 1, "unreadable item": 1}, {}),
    "overflow.csv": (3, {"unparseable timestamp": 1, "other-unit timestamp": 1}, {}),
    "plain_named_gz.csv.gz": (2, {}, {}),
    "quote_after_quote.csv": (2, {"misplaced quote in record": 1}, {}),
    "quote_not_closed.csv": (2, {"misplaced quote in record": 1}, {}),
    "quote_within.csv": (2, {"misplaced quote in record": 1}, {}),
    "replacement_character.csv": (2, {"unreadable user": 1}, {}),
    "space_around_ids.csv": (3, {}, {SPACE: 2}),
    "swallowed_by_quotes.csv": (2, {"unreadable user": 1}, {}),
    "too_few_values.csv": (2, {"missing item": 1, "missing timestamp": 1}, {}),
    "too_many_values.csv": (2, {"too many values in record": 1}, {}),
    "windows_line_ends.csv": (2, {}, {}),
}
"""How many rows of each file are kept, how many are set aside for what, and what is doubtful."""


def test_every_file_of_the_corpus_has_an_outcome():
    assert {file.name for file in CORPUS.iterdir()} - {".gitattributes"} == REFUSED.keys() | READ


def place(name, folder):
    _, *suffixes = name.split(".")
    shutil.copy(CORPUS / name, folder / ".".join(["interactions", *suffixes]))


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_is_refused_with_a_reason(tmp_path, name):
    place(name, tmp_path)
    with pytest.raises((DatasetError, InteractionsError), match=REFUSED[name]) as refusal:
        read_and_clean(tmp_path)
    if refusal.type is DatasetError:
        assert str(tmp_path) in str(refusal.value)


@pytest.mark.parametrize("name", MALFORMED)
def test_a_file_with_malformed_records_is_refused_where_they_are_not_set_aside(tmp_path, name):
    place(name, tmp_path)
    table = RawTableDataset(filepath=str(tmp_path / "interactions"))
    with pytest.raises(DatasetError, match=MALFORMED[name]) as refusal:
        table.load().collect()
    assert str(tmp_path) in str(refusal.value)


@pytest.mark.parametrize("name", READ)
def test_rows_are_kept_or_set_aside_with_a_reason(tmp_path, name):
    place(name, tmp_path)
    kept, rejected, report = read_and_clean(tmp_path)
    n_kept, reasons, doubtful = READ[name]
    assert len(kept) == n_kept
    assert {reason: loss["rows"] for reason, loss in report["dropped"].items()} == reasons
    assert sorted(row[4] for row in rejected) == sorted(
        reason for reason, rows in reasons.items() for _ in range(rows)
    )
    assert report["doubtful"] == doubtful


def test_what_a_misplaced_quote_swallowed_is_set_aside_with_it(tmp_path):
    place("swallowed_by_quotes.csv", tmp_path)
    _, ((data_row, user, item, timestamp, reason, _),), report = read_and_clean(tmp_path)
    assert (data_row, item, timestamp, reason) == (2, "i4", "1405686609", "unreadable user")
    assert user == "u1,i1,1405686606\nu2,i2,1405686607\nu3,i3,1405686608\nu4"
    assert report["dropped"][reason]["example"] == user


VALID = b"userid,itemid,timestamp,note\n" + b"".join(
    b"u%d,i%d,%d,%s\n" % (row % 5, row % 7, 1405686605 + row, note)
    for row, note in enumerate([b"", b'"a, b"', b"x", b'"say ""hi"""'] * 3)
)
PIECES = [
    b'"', b",", b"\n", b"\r\n", b"\r", b"\0", b"\xff", b'""', b'",', b',"', b'"\n', b'\n"', b" ",
    b"\xef\xbb\xbf", b"9" * 30, b"\n\n", b"\t", b";", b"\\",
    b"u1,i1,1405686605,\n", b"nan,nan,nan\n",
]  # fmt: skip

places = st.integers(0, len(VALID))
cuts = st.builds(lambda at: lambda text: text[:at], places)
insertions = st.builds(
    lambda at, piece, gone: lambda text: text[:at] + piece + text[at + gone :],
    places,
    st.sampled_from(PIECES) | st.binary(min_size=1, max_size=3),
    st.integers(0, 4),
)


def mutate(changes):
    text = VALID
    for change in changes:
        text = change(text)
    return text


broken_files = st.lists(insertions | insertions | cuts, min_size=1, max_size=4).map(mutate)


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(broken_files | broken_files | st.binary(max_size=60))
@example(VALID.replace(b"note", b'no"te').replace(b"u4,i4", b'"u4,i4'))
@example(VALID.replace(b"1405686606,", b'"14,"').replace(b"1405686608,", b'14,"'))
@example(VALID[:-1] + b'\n""')
def test_a_broken_file_is_refused_or_accounted_for_row_by_row(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp() / "broken"
    folder.mkdir(exist_ok=True)
    (folder / "interactions.csv").write_bytes(content)
    try:
        kept, rejected, report = read_and_clean(folder)
    except (DatasetError, InteractionsError) as refusal:
        assert len(str(refusal)) > 20  # noqa: PT017 - either outcome is right
        return
    swallowing = [row for row in rejected if any("\n" in (value or "") for value in row[1:4])]
    if swallowing or LINE_BREAK in report["doubtful"]:
        return  # told, and what was swallowed is in the values set aside
    records = [record for *_, record in rejected if record is not None]
    if any("\N{REPLACEMENT CHARACTER}" in record for record in records):
        return
    (header, *rows), is_open = read_records(blank_out(content, records))
    assert len(kept) + len(rejected) == len(rows)
    if is_open:  # cut within the last value
        rows = rows[:-1]
    columns = [header.index(name) for name in (b"userid", b"itemid", b"timestamp")]
    for data_row, *values, _, record in rejected:
        if data_row <= len(rows) and record is None:
            assert [value or "" for value in values] == pick(rows[data_row - 1], columns)
    for row, user, item, _ in kept:
        if row < len(rows):
            assert [user, item] == pick(rows[row], columns[:2])


def blank_out(content, records):
    """Leave nothing but the line breaks of malformed records."""
    at = 0
    if records and not content.endswith(b"\n"):
        content += b"\n"
    for record in records:
        line = re.compile(rb"(?<=\n)" + re.escape(record.encode()) + rb"(?=\r*\n)")
        found = line.search(content, at)
        assert found
        content = content[: found.start()] + content[found.end() :]
        at = found.start()
    return content


def pick(fields, columns):
    """Values of columns; a short row lacks the last."""
    return [fields[column].decode() if column < len(fields) else "" for column in columns]
