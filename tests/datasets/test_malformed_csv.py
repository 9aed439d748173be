from __future__ import annotations

import csv
import gzip
import io

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kedro.io import DatasetError

from sce_pipeline.datasets import malformed_csv
from sce_pipeline.datasets.malformed_csv import read_around_malformed
from sce_pipeline.datasets.raw_table import RawTableDataset

TOO_MANY = "too many values in record"
QUOTE = "misplaced quote in record"
NOT_UTF_8 = "bytes that are not UTF-8 in record"

HEADER = b"user,item,note\n"
SOUND = [b"u0,i0,x\n", b'u1,"i1",""\n', b'u2,i2,"over\r\n""two"", lines"\r\n', b"u3,i3\n", b"\n"]
ROWS = [
    ("u0", "i0", "x"),
    ("u1", "i1", ""),
    ("u2", "i2", 'over\r\n"two", lines'),
    ("u3", "i3", None),
    (None, None, None),
]

MALFORMED = {
    b"u,i,x,y": TOO_MANY,
    b"u,i,x,": TOO_MANY,
    b'u,i,"x\ny",z': TOO_MANY,
    b'"u,i,x': QUOTE,
    b'u,"i,x': QUOTE,
    b'u,i,"': QUOTE,
    b'u,i"1,x': QUOTE,
    b'u,"i"1,x': QUOTE,
    b'u,"i" ,x': QUOTE,
    b'u,i,"a""': QUOTE,
    b"u,caf\xe9,x": NOT_UTF_8,
    b'u,"caf\xe9",x': NOT_UTF_8,
    b"u,i,\xff\xfe": NOT_UTF_8,
}


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Read contents around what is malformed, so many bytes at a time."""

    def read_in_blocks(content, block=2**23):
        file = tmp_path / "any.csv"
        file.write_bytes(content)
        monkeypatch.setattr(malformed_csv, "_BLOCK", block)
        return pl.concat(read_around_malformed(file))

    return read_in_blocks


@pytest.fixture
def load(tmp_path):
    """Load a log whose malformed records are set aside."""

    def load_log(content, suffix=".csv"):
        (tmp_path / f"log{suffix}").write_bytes(content)
        return RawTableDataset(filepath=str(tmp_path / "log"), set_aside_malformed=True).load()

    return load_log


def shown(record):
    return record.decode(errors="replace")


@pytest.mark.parametrize("record", MALFORMED)
@pytest.mark.parametrize("at", [0, 2, len(SOUND)])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_a_malformed_record_costs_itself_alone(read, record, at, end):
    content = HEADER + b"".join([*SOUND[:at], record + end, *SOUND[at:]])
    found = read(content)
    nulls = (None,) * 3
    expected = [(*row, None, None) for row in ROWS]
    expected.insert(at, (*nulls, MALFORMED[record], shown(record)))
    assert found.drop("row").rows() == expected
    assert found["row"].to_list() == list(range(len(SOUND) + 1))
    for block in (1, 7):
        assert read(content, block).equals(found)


@pytest.mark.parametrize("record", MALFORMED)
def test_the_last_record_may_be_malformed_without_a_line_end(read, record):
    found = read(HEADER + b"".join(SOUND) + record)
    assert found.rows()[-1] == (None, None, None, MALFORMED[record], shown(record), len(SOUND))
    assert found.drop("row", "malformed", "malformed_record").rows()[:-1] == ROWS


def test_records_of_all_kinds_are_told_with_no_sound_one_among_them(read):
    records = [line for record in MALFORMED for line in (record + b"\n", *SOUND)]
    found = read(HEADER + b"".join(records))
    told = found.filter(pl.col("malformed").is_not_null())
    assert dict(told.select("malformed_record", "malformed").rows()) == {
        shown(record): reason for record, reason in MALFORMED.items()
    }
    kept = found.filter(pl.col("malformed").is_null())
    assert kept.select("user", "item", "note").rows() == ROWS * len(MALFORMED)
    assert told["row"].to_list() == [6 * number for number in range(len(MALFORMED))]


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz"])
@pytest.mark.parametrize("places", [[0], [50_000], [99_999], [7, 60_000]])
@pytest.mark.parametrize("stray", [b'u,"i,x', b'u,i"1,x'])
def test_a_stray_quote_amid_many_rows_costs_one_row(load, suffix, places, stray):
    lines = [b"u%d,i%d,x" % (row, row % 7) for row in range(100_000)]
    for place in places:
        lines[place] = stray
    content = HEADER + b"\n".join(lines) + b"\n"
    table = load(gzip.compress(content) if suffix == ".csv.gz" else content, suffix)
    found = table.collect()
    assert found["row"].to_list() == list(range(100_000))
    told = found.filter(pl.col("malformed").is_not_null())
    assert told.select("row", "malformed", "malformed_record").rows() == [
        (place, QUOTE, stray.decode()) for place in places
    ]
    sound = found.filter(pl.col("malformed").is_null())
    assert sound["user"].to_list() == [f"u{row}" for row in sound["row"]]
    assert table.select("item").collect()["item"].equals(found["item"])
    last = table.filter(pl.col("malformed").is_not_null()).select("row").tail(1).collect().item()
    assert last == places[-1]
    assert table.head(places[-1] + 1).collect().equals(found.head(places[-1] + 1))


fields = st.text(st.sampled_from('ab,"\n\r é\x00'), max_size=4)
tables = st.integers(1, 3).flatmap(
    lambda width: st.lists(st.lists(fields, min_size=width, max_size=width), max_size=6)
)
blocks = st.integers(1, 40) | st.just(2**23)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tables, blocks, st.sampled_from(["\n", "\r\n"]), st.booleans(), st.booleans())
def test_a_sound_file_is_read_as_polars_reads_it(read, rows, block, line_end, has_mark, quotes_all):
    text = io.StringIO(newline="")
    quoting = csv.QUOTE_ALL if quotes_all else csv.QUOTE_MINIMAL
    width = len(rows[0]) if rows else 1
    csv.writer(text, lineterminator=line_end, quoting=quoting).writerows(
        [["x,y", "b", "c"][:width], *rows]
    )
    content = b"\xef\xbb\xbf" * has_mark + text.getvalue().encode()
    if not rows:
        return
    found = read(content, block)
    assert found["malformed"].null_count() == found["malformed_record"].null_count() == len(found)
    expected = pl.read_csv(content, infer_schema=False)
    assert found.select(expected.columns).equals(expected)
    assert found["row"].to_list() == list(range(len(rows)))


malformed_records = st.sampled_from(list(MALFORMED))
sound_records = st.sampled_from(SOUND)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(malformed_records.map(lambda record: record + b"\n") | sound_records, min_size=1),
    blocks,
)
def test_malformed_records_are_told_in_any_number_at_any_block_size(read, records, block):
    found = read(HEADER + b"".join(records), block)
    whole = read(HEADER + b"".join(records))
    assert found.equals(whole)


def test_a_quote_amid_a_value_leaves_no_line_break_in_quotes(read):
    found = read(HEADER + SOUND[0] + b'u"1,"a\nb",x"\n' + SOUND[0])
    assert found.select("user", "item", "malformed_record").rows() == [
        ("u0", "i0", None),
        (None, None, 'u"1,"a'),
        ('b"', 'x"', None),
        ("u0", "i0", None),
    ]


def test_quotes_that_polars_takes_but_that_may_hide_lines_are_told_at_any_block_size(read):
    content = b"a,b\n" + b'x"y"","1,2\n\r"a""\n\0"p\nq",2\n,",,"'
    whole = read(content)
    assert whole["malformed_record"][0] == 'x"y"","1,2'
    for block in (1, 2, 3, 7, 20):
        assert read(content, block).equals(whole)


def test_no_more_is_held_than_a_record_may_have(tmp_path, monkeypatch):
    monkeypatch.setattr(malformed_csv, "_BLOCK", 100)
    monkeypatch.setattr(malformed_csv, "LONGEST_RECORD", 1000)
    (tmp_path / "any.csv").write_bytes(HEADER + b'u,"i,x\n' + b"1,2,3\n" * 1000)
    parts = [len(part) for part in read_around_malformed(tmp_path / "any.csv")]
    assert sum(parts) == 1001
    assert max(parts) < 200


def test_a_long_record_is_shown_by_its_beginning(read):
    found = read(HEADER + b"u,i,%s,y\n" % (b"\xc3\xa9" * 5000) + b"u,i,%s,y\n" % (b"\xff" * 5000))
    assert [len(text) for text in found["malformed_record"]] == [1000, 1000]
    assert found["malformed_record"][0] == "u,i," + "é" * 996


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz"])
def test_a_quote_that_nothing_closes_costs_its_line_whatever_follows(load, suffix):
    n_rows = 5_000_000
    content = HEADER + b'u,"i,x\n' + b"1,2,3\n" * n_rows + b"1,2,3,4\n"
    table = load(gzip.compress(content, 1) if suffix == ".csv.gz" else content, suffix)
    found = table.select(
        pl.len(), pl.col("user").count(), told=pl.col("malformed").drop_nulls().implode()
    ).collect()
    assert found.rows() == [(n_rows + 2, n_rows, [QUOTE, TOO_MANY])]


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz"])
def test_a_line_without_end_is_refused_as_ever(load, monkeypatch, suffix):
    monkeypatch.setattr(malformed_csv, "_BLOCK", 2**20)
    content = HEADER + b"1,2,3,4\n" + b"1,2,3\n" * 1000 + b"1" * 2**24 + b",2\n"
    table = load(gzip.compress(content, 1) if suffix == ".csv.gz" else content, suffix)
    message = rf"log\{suffix}: line 1003 begins a record of 16,777,216 bytes or more"
    with pytest.raises(DatasetError, match=message.replace(".gz", r"\.gz")):
        table.collect()


def test_an_archive_that_is_damaged_behind_a_malformed_record_is_refused(load):
    content = HEADER + b"".join(b"%d,%d,%d\n" % (row, row * row, row) for row in range(100_000))
    packed = gzip.compress(content.replace(b"\n7,", b'\n7,",'))
    with pytest.raises(DatasetError, match=r"Cannot read .*log\.csv\.gz: Compressed file ended"):
        load(packed[:-1000], ".csv.gz").collect()


def test_a_sound_log_has_nothing_to_tell(load):
    table = load(HEADER + b"".join(SOUND))
    assert table.collect_schema().names() == [
        "row", "user", "item", "note", "malformed", "malformed_record",
    ]  # fmt: skip
    assert table.select("malformed", "malformed_record").collect().rows() == [(None, None)] * 5


@pytest.mark.parametrize("name", ["row", "malformed", "malformed_record"])
def test_names_that_are_given_here_are_refused(load, name):
    with pytest.raises(DatasetError, match=f"rename its column '{name}', here "):
        load(b"user,%s\n1,2\n" % name.encode())


def test_other_tables_may_have_columns_of_such_names(tmp_path):
    (tmp_path / "items.csv").write_bytes(b"malformed,malformed_record\n1,2\n")
    table = RawTableDataset(filepath=str(tmp_path / "items")).load()
    assert table.collect().rows() == [(0, "1", "2")]
