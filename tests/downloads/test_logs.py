from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import json
import zipfile
from functools import partial

import polars as pl
import pytest
from filelock import FileLock
from kedro.io import DatasetError
from site_on_this_machine import Site

from sce_pipeline.downloads import DownloadError, fetching
from sce_pipeline.downloads.logs import obtain
from sce_pipeline.downloads.sources import BY_HAND, SOURCES, find_source
from sce_pipeline.downloads.tables import read_tables

gzipped = partial(gzip.compress, mtime=0)  # the time would be in the names of tests


@pytest.fixture
def site(monkeypatch):
    monkeypatch.setattr(fetching, "PAUSE", 0.0)
    site = Site()
    yield site
    site.close()


def zipped(**members):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in members.items():
            archive.writestr(name.replace("__", "/").replace("_dot_", "."), content)
    return stream.getvalue()


def reviews():
    rows = [("A1", "B1", 5), ("A2", "B1", 6), ("A1", "B2", 7)]
    lines = [
        {
            "reviewerID": user,
            "asin": item,
            "helpful": [0, 1],
            "overall": 5.0,
            "unixReviewTime": time,
        }
        for user, item, time in rows
    ]
    return gzip.compress("\n".join(map(json.dumps, lines)).encode())


CSV = {
    "ratings_dot_csv": b"userId,movieId,rating,timestamp\n1,31,2.5,1260759144\n2,10,4,835355493\n",
    "movies_dot_csv": b'movieId,title,genres\n31,"Minds, Dangerous (1995)",A\n10,GoldenEye,B\n',
}
CONTENTS = {
    "movielens_latest_small": zipped(**{f"ml-latest-small__{k}": v for k, v in CSV.items()}),
    "movielens_20m": zipped(**{f"ml-20m__{name}": content for name, content in CSV.items()}),
    "movielens_1m": zipped(
        **{
            "ml-1m__ratings_dot_dat": b"1::31::5::978300760\n2::10::3::978302109\n",
            "ml-1m__movies_dot_dat": b"31::Am\xe9lie:\x85 A::Drama\n10::GoldenEye::Action\r\n",
        }
    ),
    "gowalla": gzip.compress(
        b'0\t2010-10-19T23:55:27Z\t30.2\t-97.7\t22847\n7\t2010-10-18T22:17:43Z\t30.2\t-97.7\t4"2\n'
    ),
    "amazon_beauty": reviews(),
    "beeradvocate": gzip.compress(
        b"{'beer/beerId': '47986', 'review/profileName': \"O'Neil\", 'review/time': '1234817823'}\n"
        b"{}\n{'beer/name': 'x', 'beer/beerId': '7', 'review/profileName': 'a\\tb'}\n"
    ),
    "kindle_store": b"A1,B1,5.0,1405686605\nA2,B2,4.0,1405686606\n",
}
TABLES = {
    "movielens_1m": (
        [("1", "31", "978300760"), ("2", "10", "978302109")],
        [("31", "Amélie:\x85 A"), ("10", "GoldenEye")],
    ),
    "gowalla": (
        [("0", "22847", "2010-10-19T23:55:27Z"), ("7", '4"2', "2010-10-18T22:17:43Z")],
        None,
    ),
    "amazon_beauty": ([("A1", "B1", 5), ("A2", "B1", 6), ("A1", "B2", 7)], None),
    "beeradvocate": (
        [("O'Neil", "47986", "1234817823"), (None, None, None), ("a\tb", "7", None)],
        None,
    ),
    "kindle_store": ([("A1", "B1", "1405686605"), ("A2", "B2", "1405686606")], None),
} | dict.fromkeys(
    ("movielens_latest_small", "movielens_20m"),
    (
        [("1", "31", "1260759144"), ("2", "10", "835355493")],
        [("31", "Minds, Dangerous (1995)"), ("10", "GoldenEye")],
    ),
)


def publish(site, name, content=None):
    """Put a log on the site, with its checksum where its publisher gives one."""
    content = CONTENTS[name] if content is None else content
    source = SOURCES[name]
    url = site.put(source.filename, content, '"1"')
    checksum_url = None
    if source.checksum_url is not None:
        md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
        line = f"MD5 ({source.filename}) = {md5}\n"
        checksum_url = site.put(f"{source.filename}.md5", line.encode())
    return dataclasses.replace(source, url=url, checksum_url=checksum_url)


@pytest.mark.parametrize("name", SOURCES)
def test_a_log_comes_with_its_terms_and_is_read(site, tmp_path, name, caplog):
    source = publish(site, name)
    with caplog.at_level("INFO", logger="sce_pipeline"):
        file = obtain(source, tmp_path / "download")
    assert source.terms in caplog.text
    assert source.terms in (tmp_path / "download/TERMS.txt").read_text()
    tables = read_tables(source, file)
    rows, titles = TABLES[name]
    found = tables["interactions"].select("userid", "itemid", "timestamp").collect()
    assert found.rows() == rows
    assert ("items" in tables) == (titles is not None)
    if titles is not None:
        assert tables["items"].select("itemid", "title").collect().rows() == titles


@pytest.mark.parametrize("name", SOURCES)
def test_addresses_are_safe_and_limits_leave_room(name):
    source = SOURCES[name]
    for url in (source.url, source.page, source.checksum_url):
        assert url is None or url.startswith("https://")
    assert source.limit <= source.unpacked_limit


def test_what_is_there_is_not_fetched_again(site, tmp_path):
    source = publish(site, "movielens_1m")
    obtain(source, tmp_path)
    n_asked = len(site.asked)
    obtain(source, tmp_path)
    assert len(site.asked) == n_asked


def test_a_wrong_published_checksum_is_refused_and_the_file_removed(site, tmp_path):
    source = publish(site, "movielens_1m")
    site.put("ml-1m.zip", CONTENTS["movielens_20m"], '"2"')
    with pytest.raises(DownloadError, match=r"came with the MD5 \w{32}, expected \w{32} as http"):
        obtain(source, tmp_path)
    assert not (tmp_path / "ml-1m.zip").exists()
    publish(site, "movielens_1m")
    assert obtain(source, tmp_path).read_bytes() == CONTENTS["movielens_1m"]


def test_an_answer_without_a_checksum_is_told(site, tmp_path):
    source = publish(site, "movielens_1m")
    site.put("ml-1m.zip.md5", b"<html>moved</html>")
    with pytest.raises(DownloadError, match="has no MD5 checksum; it says '<html>moved"):
        obtain(source, tmp_path)


def test_a_file_is_held_to_the_checksum_first_seen(site, tmp_path):
    source = publish(site, "gowalla")
    file = obtain(source, tmp_path)
    sha256 = hashlib.sha256(CONTENTS["gowalla"]).hexdigest()
    record = tmp_path / f"{source.filename}.sha256"
    assert record.read_text() == f"{sha256}  {source.filename}\n"
    file.unlink()
    publish(site, "gowalla", gzip.compress(b"1\t2\t3\t4\t5\n"))
    for _ in range(2):
        with pytest.raises(DownloadError, match=r"not the one first seen, in .* Remove both"):
            obtain(source, tmp_path)
    file.unlink()
    record.unlink()
    obtain(source, tmp_path)


def test_two_runs_do_not_download_to_one_place(site, tmp_path):
    source = publish(site, "gowalla")
    with (
        FileLock(tmp_path / ".lock"),
        pytest.raises(DownloadError, match="another run downloads to"),
    ):
        obtain(source, tmp_path)
    obtain(source, tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gowalla", b"<html>Please sign in</html>", "is no whole gzip file"),
        ("gowalla", gzipped(b""), "Cannot read"),
        ("gowalla", gzipped(b"a\tb\n"), "Cannot read"),
        ("amazon_beauty", gzipped(b"{'reviewerID': 'A1'}\n"), "Cannot read"),
        ("beeradvocate", gzipped(b""), "has no interactions"),
        ("beeradvocate", gzipped(b"__import__('os').getcwd()\n"), "line 1: expected a dict"),
        ("beeradvocate", gzipped(b"{'beer/beerId': 7}\n"), "line 1: expected a dict"),
        ("beeradvocate", gzipped(b"(" * 10**6 + b"\n"), "line 1: expected a dictionary"),
        ("beeradvocate", gzipped(b"\xff\n"), "line 1: expected a dictionary"),
        ("movielens_20m", zipped(**{"ml-20m__ratings_dot_csv": b"a,b\n1,2\n"}), "has 0 files"),
        ("movielens_1m", b"", "is no whole zip archive"),
    ],
)
def test_a_file_that_is_not_as_its_publisher_writes_it_is_refused(
    site, tmp_path, name, content, message
):
    source = publish(site, name, content)
    with pytest.raises(DownloadError, match=message) as refusal:
        read_tables(source, obtain(source, tmp_path))
    assert str(tmp_path) in str(refusal.value)


@pytest.mark.parametrize("name", BY_HAND)
def test_a_log_behind_a_form_is_refused_with_the_page(name):
    with pytest.raises(DownloadError, match=r"cannot be fetched for you: .*https://"):
        find_source(name)


def test_an_unknown_log_names_those_that_there_are():
    with pytest.raises(DownloadError, match=r"No public log is called 'netflix'; there are movie"):
        find_source("netflix")


def test_a_run_goes_from_an_address_to_sequences(project, site, monkeypatch):
    log = "".join(
        f"u{user},i{(user + step) % 5},5.0,{1405686605 + step}\n"
        for user in range(6)
        for step in range(5)
    )
    source = publish(site, "kindle_store", log.encode())
    monkeypatch.setitem(SOURCES, "mine", source)
    site.plan = ["cut"]
    project.run(pipelines=["download"], dataset="mine")
    folder = project.path("01_raw", "mine")
    assert sorted(path.name for path in folder.iterdir()) == ["download", "interactions.parquet"]
    assert pl.read_parquet(folder / "interactions.parquet").height == 30
    parameters = {"filters": {"min_users_per_item": 1, "min_items_per_user": 1}}
    project.run(
        pipelines=["data_processing"],
        dataset="mine",
        split="leave_one_out",
        data_processing=parameters,
    )
    assert project.path("05_model_input", "mine", "train_sequences.safetensors").exists()


@pytest.mark.parametrize("name", ["movielens_20m", "kindle_store", "beeradvocate"])
def test_a_second_run_leaves_what_is_there(project, site, monkeypatch, caplog, name):
    monkeypatch.setitem(SOURCES, "mine", publish(site, name))
    project.run(pipelines=["download"], dataset="mine")
    tables = {file: file.stat().st_mtime_ns for file in project.path("01_raw").rglob("*.parquet")}
    n_asked = len(site.asked)
    caplog.clear()
    project.run(pipelines=["download"], dataset="mine")
    assert {file: file.stat().st_mtime_ns for file in tables} == tables
    assert len(site.asked) == n_asked
    assert "is there already and is not fetched again" in caplog.text
    for file in tables:
        assert f"{file} is there already, with just these rows" in caplog.text


def test_a_second_run_writes_what_is_missing(project, site, monkeypatch):
    monkeypatch.setitem(SOURCES, "mine", publish(site, "movielens_20m"))
    project.run(pipelines=["download"], dataset="mine")
    items = project.path("01_raw", "mine", "items.parquet")
    before = items.read_bytes()
    items.unlink()
    project.run(pipelines=["download"], dataset="mine")
    assert items.read_bytes() == before


def test_a_table_that_differs_is_not_written_over(project, site, monkeypatch):
    monkeypatch.setitem(SOURCES, "mine", publish(site, "kindle_store"))
    project.run(pipelines=["download"], dataset="mine")
    file = project.path("01_raw", "mine", "interactions.parquet")
    pl.read_parquet(file).with_columns(itemid=pl.lit("B3")).write_parquet(file)
    before = file.read_bytes()
    with pytest.raises(DatasetError, match=r"already has interactions\.parquet, which is not"):
        project.run(pipelines=["download"], dataset="mine")
    assert file.read_bytes() == before


def test_nothing_is_fetched_beside_a_table_that_somebody_brought(project, site, monkeypatch):
    monkeypatch.setitem(SOURCES, "mine", publish(site, "kindle_store"))
    project.write_log("mine", [("u", "i", 1)])
    with pytest.raises(DatasetError, match=r"already has interactions\.csv, which is not"):
        project.run(pipelines=["download"], dataset="mine")
    assert not site.asked


def test_a_log_with_titles_brings_both_tables(project, site, monkeypatch):
    monkeypatch.setitem(SOURCES, "mine", publish(site, "movielens_20m"))
    project.run(pipelines=["download"], dataset="mine")
    items = pl.read_parquet(project.path("01_raw", "mine", "items.parquet"))
    assert items.select("itemid", "title").rows() == TABLES["movielens_20m"][1]
    assert project.path("01_raw", "mine", "interactions.parquet").exists()


def test_a_log_that_came_cut_off_is_told_and_can_be_fetched_anew(project, site, monkeypatch):
    monkeypatch.setitem(SOURCES, "mine", publish(site, "gowalla"))
    site.plan = ["short"]
    for _ in range(2):  # it is not fetched again behind anybody's back
        with pytest.raises(DatasetError, match=r"no whole gzip file.* To fetch it anew remove"):
            project.run(pipelines=["download"], dataset="mine")
    assert len(site.asked) == 1
    for file in project.path("01_raw", "mine", "download").glob("loc-gowalla*"):
        file.unlink()
    project.run(pipelines=["download"], dataset="mine")
    assert project.path("01_raw", "mine", "interactions.parquet").exists()


def test_a_run_for_a_log_behind_a_form_is_refused(project):
    with pytest.raises(DatasetError, match=r"https://www\.yelp\.com/dataset"):
        project.run(pipelines=["download"], dataset="yelp")
    assert not project.path("01_raw", "yelp", "download").exists()
