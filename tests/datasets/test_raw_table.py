from __future__ import annotations

import gzip
import zipfile

import polars as pl
import pytest
from kedro.io import DatasetError

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
        r"Unknown dataset 'yalp': there is no folder .*yalp\. "
        r"Expected interactions\.csv, interactions\.csv\.gz or interactions\.parquet in it\. "
        r"Datasets in .*: beauty, yelp$"
    )
    with pytest.raises(DatasetError, match=message):
        raw("yalp").load()


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
