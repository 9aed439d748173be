from __future__ import annotations

import gzip
import stat
import zipfile

import pytest

from sce_pipeline.downloads import DownloadError
from sce_pipeline.downloads.archives import check_gzip, extract

ROWS = b"userId,movieId,rating,timestamp\n" + b"1,2,3,4\n" * 1000
GZIPPED = gzip.compress(ROWS, mtime=0)  # the time would be in the names of tests


def make_zip(file, members, **options):
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, **options) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return file


def test_a_file_is_found_by_its_name_and_written_where_it_should_be(tmp_path):
    members = [("ml/ratings.csv", ROWS), ("../evil.csv", b"x"), ("/etc/evil", b"x")]
    archive = make_zip(tmp_path / "a.zip", members)
    extract(archive, "ml/ratings.csv", tmp_path / "out.csv", 10**6)
    assert (tmp_path / "out.csv").read_bytes() == ROWS
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zip", "out.csv"]


def link(name):
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("ml/movies.csv", b"x")], r"has 0 files 'ml/ratings\.csv', .* are 'ml/movies\.csv'"),
        ([("../ml/ratings.csv", b"x")], "has 0 files"),
        ([("ml/ratings.csv", b"x"), ("ml/ratings.csv", b"y")], "has 2 files"),
        ([(link("ml/ratings.csv"), b"/etc/passwd")], "is a link, expected a file"),
        ([("ml/ratings.csv", bytes(10**7))], "unpacks to more than the 1,000,000 bytes"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_archive_that_is_not_as_it_should_be_is_refused(tmp_path, members, message):
    archive = make_zip(tmp_path / "a.zip", members)
    with pytest.raises(DownloadError, match=message):
        extract(archive, "ml/ratings.csv", tmp_path / "out.csv", 10**6)
    assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]


def test_a_size_that_lies_does_not_help_a_bomb(tmp_path):
    archive = make_zip(tmp_path / "a.zip", [("ml/ratings.csv", bytes(10**7))])
    content = archive.read_bytes().replace(
        (10**7).to_bytes(4, "little"), (10).to_bytes(4, "little")
    )
    archive.write_bytes(content)
    with pytest.raises(DownloadError):
        extract(archive, "ml/ratings.csv", tmp_path / "out.csv", 10**6)
    assert not (tmp_path / "out.csv").exists()


@pytest.mark.parametrize("damage", ["cut", "flipped", "html", "encrypted"])
def test_a_damaged_archive_is_refused(tmp_path, damage):
    archive = make_zip(tmp_path / "a.zip", [("ml/ratings.csv", ROWS)])
    content = bytearray(archive.read_bytes())
    if damage == "cut":
        del content[len(content) // 2 :]
    elif damage == "flipped":
        content[60] ^= 255
    elif damage == "html":
        content = b"<html>Please sign in</html>"
    else:
        content[6] |= 1
        content[content.index(b"PK\1\2") + 8] |= 1
    archive.write_bytes(content)
    with pytest.raises(DownloadError, match=r"is no whole zip archive|is encrypted"):
        extract(archive, "ml/ratings.csv", tmp_path / "out.csv", 10**6)
    assert not (tmp_path / "out.csv").exists()


def test_a_gzipped_file_is_looked_through(tmp_path):
    file = tmp_path / "log.gz"
    file.write_bytes(GZIPPED)
    check_gzip(file, len(ROWS))
    with pytest.raises(DownloadError, match="unpacks to more than"):
        check_gzip(file, len(ROWS) - 1)


@pytest.mark.parametrize("content", [GZIPPED[:-9], b"<html>", GZIPPED[:-5] + b"12345"])
def test_a_damaged_gzipped_file_is_refused(tmp_path, content):
    file = tmp_path / "log.gz"
    file.write_bytes(content)
    with pytest.raises(DownloadError, match="is no whole gzip file"):
        check_gzip(file, 10**6)
