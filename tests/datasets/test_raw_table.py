from __future__ import annotations

import gzip
import os
import time
import zipfile

import polars as pl
import pytest
from kedro.io import DatasetError

from sce_pipeline.datasets import raw_table
from sce_pipeline.datasets.raw_table import RawTableDataset

CSV = b"user,item,time\n1,x,5\n01,,2014\n"
ROWS = [("1", "x", "5", 0), ("01", None, "2014", 1)]


@pytest.fixture
def raw(tmp_path):
    """A folder of data sets: returns one's table and writes its files."""

    def table(dataset, optional=False, **files):
        folder = tmp_path / dataset
        if files:
            folder.mkdir()
        for suffix, content in files.items():
            (folder / f"interactions.{suffix.replace('_', '.')}").write_bytes(content)
        return RawTableDataset(filepath=str(folder / "interactions"), optional=optional)

    return table


def parquet(frame, tmp_path):
    file = tmp_path / "any"
    frame.write_parquet(file)
    return file.read_bytes()


@pytest.mark.parametrize(
    "files",
    [
        {"csv": CSV},
        {"csv_gz": gzip.compress(CSV)},
        {"csv": b"\xef\xbb\xbf" + CSV},
        {"csv_gz": gzip.compress(b"\xef\xbb\xbf" + CSV)},
        {"csv": CSV.replace(b"\n", b"\r\n")},
        {"csv": CSV.rstrip(b"\n")},
    ],
)
def test_csv_columns_are_text_and_rows_are_numbered(raw, files):
    table = raw("toy", **files).load()
    assert isinstance(table, pl.LazyFrame)
    frame = table.collect()
    text = dict.fromkeys(("user", "item", "time"), pl.String)
    assert dict(frame.schema) == {"row": pl.Int64} | text
    assert frame.select("user", "item", "time", "row").rows() == ROWS


def test_parquet_keeps_its_types(raw, tmp_path):
    content = parquet(pl.DataFrame({"user": [1, 2], "time": [0.5, None]}), tmp_path)
    frame = raw("toy", parquet=content).load().collect()
    assert frame.select("user", "time", "row").rows() == [(1, 0.5, 0), (2, None, 1)]


def test_rows_keep_their_numbers_under_filters_and_selections(raw):
    lines = "".join(f"{row % 7},{row}\n" for row in range(200_000))
    table = raw("toy", csv=f"user,item\n{lines}".encode()).load()
    filtered = table.filter(pl.col("user") == "3").select("row").head(3).collect()
    assert filtered["row"].to_list() == [3, 10, 17]
    assert table.select(pl.len(), pl.col("row").max()).collect().row(0) == (200_000, 199_999)
    assert table.head(2).collect()["item"].to_list() == ["0", "1"]
    assert table.slice(150_000, 2).collect()["item"].to_list() == ["150000", "150001"]


def test_the_project_ships_movielens(request):
    folder = request.config.rootpath / "data/01_raw/movielens_small"
    log = RawTableDataset(filepath=str(folder / "interactions")).load().collect()
    assert len(log) == 100_004
    assert {"userId", "movieId", "timestamp", "row"} <= set(log.columns)
    items = RawTableDataset(filepath=str(folder / "items"), optional=True).load().collect()
    assert len(items) == 9_066


def test_an_unknown_dataset_names_those_that_there_are(raw):
    raw("beauty", csv=CSV)
    raw("yelp", csv_gz=gzip.compress(CSV))
    (raw("empty")._filepath.parent).mkdir()
    message = (
        r"Unknown dataset 'yalp': there is no folder .*yalp\. Did you mean 'yelp'\? "
        r"Expected interactions\.csv, interactions\.csv\.gz or interactions\.parquet in it\. "
        r"Datasets in .*: beauty, yelp$"
    )
    with pytest.raises(DatasetError, match=message):
        raw("yalp").load()


def test_of_many_datasets_those_of_a_like_name_and_a_few_others_are_named(raw):
    for number in range(300):
        raw(f"shop_{number:03}", csv=CSV)
    raw("yelp", csv=CSV)
    with pytest.raises(DatasetError, match=r"mean 'yelp'\? .*: shop_000, .*shop_009 and 291 more$"):
        raw("yepl").load()
    with pytest.raises(DatasetError, match=r"no folder .*beauty\. .* and 291 more$"):
        raw("beauty").load()


def test_a_folder_without_the_table_says_what_was_expected(raw, tmp_path):
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "ratings.csv").write_bytes(CSV)
    message = r"No table 'interactions' in .*toy\. Expected interactions\.csv, .*: none$"
    with pytest.raises(DatasetError, match=message):
        raw("toy").load()


def test_an_optional_table_may_be_absent(raw):
    absent = raw("toy", optional=True)
    assert absent.load() is None
    assert not absent.exists()
    present = raw("toy", optional=True, csv=CSV)
    assert present.exists()
    assert len(present.load().collect()) == 2


def test_two_files_are_one_too_many(raw):
    table = raw("toy", csv=CSV, csv_gz=gzip.compress(CSV))
    with pytest.raises(DatasetError, match=r"interactions\.csv and interactions\.csv\.gz in .*toy"):
        table.load()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"csv": b""}, "empty"),
        ({"csv_gz": gzip.compress(b"")}, "empty"),
        ({"csv": b"user,item,time\n"}, "no rows: user, item, time"),
        ({"csv": b"user\titem\ttime\n1\tx\t5\n"}, "is not comma-separated text"),
        ({"csv": b"user;item;time\n1;x;5\n"}, "must be separated by commas"),
        ({"csv": b"user,item,user\n1,x,5\n"}, "has the column 'user' more than once"),
        ({"csv": b"\x89PNG\r\n\x1a\n" + bytes(100)}, "is not comma-separated text"),
        ({"csv": b'\n\nuser,it"em\n1,2\n3,"4"\n'}, "line 3, column 'it\"em"),
        ({"csv": b"row,user\n5,1\n"}, "rename its column 'row'"),
        ({"csv_gz": b"\x1f\x8b" + bytes(range(256))}, "Cannot read"),
        ({"parquet": CSV}, "Cannot read"),
        ({"parquet": b""}, "Cannot read"),
    ],
)
def test_what_is_no_table_is_refused_by_name(raw, files, message):
    table = raw("toy", **files)
    with pytest.raises(DatasetError, match=message) as refusal:
        table.load()
    assert str(table._filepath) in str(refusal.value)


def test_a_zip_archive_is_no_csv(raw, tmp_path):
    with zipfile.ZipFile(tmp_path / "any.zip", "w") as archive:
        archive.writestr("interactions.csv", CSV)
    table = raw("toy", csv=(tmp_path / "any.zip").read_bytes())
    with pytest.raises(DatasetError, match=r"interactions\.csv is not comma-separated text"):
        table.load()


LONG = b"user,item\n" + b"".join(b"%d,%d\n" % (row, row * row) for row in range(100_000))


@pytest.mark.parametrize(
    "files",
    [
        {"csv_gz": gzip.compress(LONG)[:100_000]},
        {"csv_gz": gzip.compress(LONG)[:-8] + bytes(8)},
        {"csv": LONG + b"1,2,3\n"},
        {"csv": LONG + b"caf\xe9,2\n"},
        {"csv": LONG + b'"open,2\n'},
    ],
)
def test_damage_that_shows_while_reading_is_blamed_on_the_file(raw, files):
    table = raw("toy", **files)
    with pytest.raises(DatasetError, match="Cannot read") as refusal:
        table.load().group_by("user", "item").len().collect()
    assert str(table._filepath) in str(refusal.value)


def test_raw_data_is_never_written(raw):
    table = raw("toy", csv=CSV)
    with pytest.raises(DatasetError, match="only read"):
        table.save(pl.DataFrame({"user": [1]}))
    assert table.load().collect().height == 2


def test_a_link_is_followed_wherever_it_leads(raw, tmp_path):
    (tmp_path / "elsewhere.csv").write_bytes(CSV)
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy/interactions.csv").symlink_to(tmp_path / "elsewhere.csv")
    assert raw("toy").load().collect().height == 2


@pytest.mark.parametrize("optional", [False, True])
def test_what_is_no_file_is_not_taken_for_absent(raw, tmp_path, optional):
    places = {name: tmp_path / name / "interactions.csv" for name in ("folder", "link", "loop")}
    for place in places.values():
        place.parent.mkdir()
    places["folder"].mkdir()
    places["link"].symlink_to("../gone.csv")
    places["loop"].symlink_to("interactions.csv")
    for name, found in {
        "folder": "a folder",
        "link": r"a link to \.\./gone\.csv, where there is no file",
        "loop": r"a link to interactions\.csv, where there is no file",
    }.items():
        message = rf"{places[name]} is {found}; expected a file"
        with pytest.raises(DatasetError, match=message):
            raw(name, optional=optional).load()


def test_a_pipe_is_no_file(raw, tmp_path):
    (tmp_path / "toy").mkdir()
    os.mkfifo(tmp_path / "toy/interactions.csv")
    with pytest.raises(DatasetError, match="is neither a file nor a link to one"):
        raw("toy").load()


def test_the_line_at_fault_is_found_far_down_and_behind_lines_of_one_row(raw):
    start = b'\n\nuser,item,"a ""note"""\n' + b'1,2,"over\ntwo lines"\n' * 50_000
    table = raw("toy", csv=start + b"1,2,x,too,many\n" + b"1,2,x\n" * 1000)
    message = (
        r"line 100004, after column '\"a \"\"note\"\"\"': expected 3 values, found 5, the first "
        r"too many being 'too'"
    )
    with pytest.raises(DatasetError, match=message):
        table.load().select(pl.col("user").n_unique()).collect()


def test_a_quote_that_is_never_closed_is_found_at_once_in_a_long_file(raw):
    table = raw("toy", csv=b"user,item\n1,2\n" + b'"open,2\n' + b"1,2\n" * 5_000_000)
    message = r"line 3 begins a record of 16,777,216 bytes or more, '\"open,2\\n1,2.*'…: is a quote"
    started = time.perf_counter()
    with pytest.raises(DatasetError, match=message):
        table.load().select(pl.col("user").n_unique()).collect()
    assert time.perf_counter() - started < 10


def test_a_bomb_of_rows_is_read_in_parts(raw, monkeypatch):
    monkeypatch.setattr(raw_table, "LONGEST_RECORD", 2**16)
    rows = b"user,item\n" + b"1,2\n" * 200_000
    assert (
        raw("rows", csv_gz=gzip.compress(rows)).load().select(pl.len()).collect().item() == 200_000
    )


HEADER = gzip.compress(b"user,item\n1,2\n")
ROW = gzip.compress(b"1,2\n")


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (gzip.compress(b"u" * 2**17 + b",item\n1,2\n"), 1),
        (gzip.compress(b"user,item\n1,2\n" + b"1" * 2**20 + b",2\n"), 3),
        (HEADER + gzip.compress(b"1" * 2**20 + b",2\n") + ROW, 3),
        (HEADER + gzip.compress(b"1" * 2**20) + gzip.compress(b"1" * 2**17 + b",2\n") + ROW, 3),
        (HEADER + gzip.compress(b'"' + b"1\n" * 2**17 + b'",2\n') + ROW, 3),
        (HEADER + gzip.compress(b'"1\n",2\n' * 30_000 + b'3,"' + b"\n" * 2**20 + b'"\n'), 60_003),
    ],
    ids=["header", "row", "amid members", "over members", "quoted", "after quoted lines"],
)
def test_a_record_that_would_fill_the_memory_is_refused(raw, monkeypatch, content, line):
    monkeypatch.setattr(raw_table, "LONGEST_RECORD", 2**16)
    message = rf"interactions\.csv\.gz: line {line} begins a record of 65,536 bytes or more"
    with pytest.raises(DatasetError, match=message):
        raw("toy", csv_gz=content).load()
