from __future__ import annotations

import errno
import http.client
import json
import os
import ssl
from pathlib import Path

import pytest
from site_on_this_machine import Site

from sce_pipeline.downloads import DownloadError, fetching
from sce_pipeline.downloads.fetching import fetch

CONTENT = bytes(range(256)) * 2000
LIMIT = 10**6


@pytest.fixture
def site(monkeypatch):
    monkeypatch.setattr(fetching, "PAUSE", 0.0)
    monkeypatch.setattr(fetching, "TIMEOUT", 0.3)
    site = Site()
    yield site
    site.close()


@pytest.fixture
def file(tmp_path):
    return tmp_path / "log.gz"


def test_a_file_appears_once_it_is_whole(site, file):
    fetch(site.put("log", CONTENT, '"1"'), file, LIMIT)
    assert file.read_bytes() == CONTENT
    assert [path.name for path in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize("act", ["cut", "stall"])
def test_what_breaks_off_is_gone_on_with(site, file, act, caplog):
    url = site.put("log", CONTENT, '"1"')
    site.plan = [act, act]
    fetch(url, file, LIMIT)
    assert file.read_bytes() == CONTENT
    half, more = len(CONTENT) // 2, len(CONTENT) * 3 // 4
    assert site.asked == [("log", None), ("log", f"bytes={half}-"), ("log", f"bytes={more}-")]
    assert f"broke off after {half:,} bytes" in caplog.text


UNREACHABLE = OSError(errno.EHOSTUNREACH, os.strerror(errno.EHOSTUNREACH))
BAD_RECORD = ssl.SSLError(1, "[SSL] record layer failure")


@pytest.mark.parametrize("error", [UNREACHABLE, BAD_RECORD], ids=["unreachable", "tls"])
@pytest.mark.parametrize("call", ["read1", "begin"])
def test_whatever_the_connection_fails_with_is_gone_on_with(
    site, file, monkeypatch, caplog, call, error
):
    url = site.put("log", CONTENT, '"1"')
    site.plan = ["cut"] if call == "begin" else []
    original, calls = getattr(http.client.HTTPResponse, call), []

    def fail_the_second_time(response, *arguments):
        calls.append(call)
        if len(calls) == 2:
            raise error
        return original(response, *arguments)

    monkeypatch.setattr(http.client.HTTPResponse, call, fail_the_second_time)
    fetch(url, file, LIMIT)
    assert file.read_bytes() == CONTENT
    assert all(part is not None for _, part in site.asked[1:])
    assert str(error) in caplog.text


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.ETIMEDOUT])
def test_a_disk_that_fails_is_not_taken_for_the_connection(site, file, monkeypatch, number):
    error = OSError(number, os.strerror(number))
    open_file = Path.open

    def open_or_fail(path, mode="r", *arguments, **options):
        if mode == "ab":
            raise error
        return open_file(path, mode, *arguments, **options)

    monkeypatch.setattr(Path, "open", open_or_fail)
    with pytest.raises(OSError) as raised:  # noqa: PT011 - it is the very error
        fetch(site.put("log", CONTENT), file, LIMIT)
    assert raised.value is error
    assert len(site.asked) == 1


def test_a_later_run_goes_on_where_an_earlier_one_gave_up(site, file, monkeypatch):
    monkeypatch.setattr(fetching, "ATTEMPTS", 1)
    url = site.put("log", CONTENT, '"1"')
    site.plan = ["cut"]
    with pytest.raises(DownloadError, match=r"gave up after 1 attempts. The same command goes on"):
        fetch(url, file, LIMIT)
    assert not file.exists()
    fetch(url, file, LIMIT)
    assert file.read_bytes() == CONTENT
    assert site.asked[-1] == ("log", f"bytes={len(CONTENT) // 2}-")
    assert [path.name for path in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize(
    "act", ["range ignored", "range shifted", "range unsaid", "version ignored", 416]
)
def test_no_two_versions_are_ever_mixed(site, file, monkeypatch, act):
    monkeypatch.setattr(fetching, "ATTEMPTS", 1)
    url = site.put("log", CONTENT, '"1"')
    site.plan = ["cut"]
    with pytest.raises(DownloadError):
        fetch(url, file, LIMIT)
    monkeypatch.setattr(fetching, "ATTEMPTS", 3)
    site.put("log", CONTENT[::-1], '"2"')
    if act in ("range shifted", "range unsaid"):  # which only who sends a part can do
        site.put("log", CONTENT, '"1"')
    site.plan = [act]
    fetch(url, file, LIMIT)
    assert file.read_bytes() == site.files["log"]


def test_a_file_that_changes_meanwhile_is_fetched_anew(site, file, monkeypatch):
    monkeypatch.setattr(fetching, "ATTEMPTS", 1)
    url = site.put("log", CONTENT, '"1"')
    site.plan = ["cut"]
    with pytest.raises(DownloadError):
        fetch(url, file, LIMIT)
    site.put("log", CONTENT[::-1], '"2"')
    fetch(url, file, LIMIT)
    assert file.read_bytes() == CONTENT[::-1]


@pytest.mark.parametrize("tag", [None, 'W/"1"'])
def test_without_a_strong_version_nothing_is_gone_on_with(site, file, tag):
    url = site.put("log", CONTENT, tag)
    site.plan = ["cut"]
    fetch(url, file, LIMIT)
    assert file.read_bytes() == CONTENT
    assert site.asked == [("log", None), ("log", None)]


@pytest.mark.parametrize("record", ["", "[]", '{"url": 1}', '{"version": "x"}', "\0"])
def test_a_damaged_record_of_a_part_is_no_reason_to_go_on(site, file, record):
    file.with_name("log.gz.part").write_bytes(b"something else")
    file.with_name("log.gz.part.json").write_text(record)
    fetch(site.put("log", CONTENT, '"1"'), file, LIMIT)
    assert file.read_bytes() == CONTENT
    assert site.asked == [("log", None)]


def test_a_part_of_another_address_is_not_gone_on_with(site, file):
    file.with_name("log.gz.part").write_bytes(CONTENT[:10])
    record = {"url": "https://example.org", "version": '"1"'}
    file.with_name("log.gz.part.json").write_text(json.dumps(record))
    fetch(site.put("log", CONTENT, '"1"'), file, LIMIT)
    assert site.asked == [("log", None)]


def test_a_server_that_announces_too_much_is_given_up_on(site, file):
    site.plan = ["long"] * fetching.ATTEMPTS
    with pytest.raises(DownloadError, match="gave up after 5 attempts"):
        fetch(site.put("log", CONTENT, '"1"'), file, 2 * LIMIT)
    assert not file.exists()


@pytest.mark.parametrize("act", ["whole", "unannounced", "endless"])
def test_no_more_comes_than_was_expected(site, file, act):
    site.plan = [act]
    with pytest.raises(DownloadError, match=r"expected at most 1,000|after the 1,000 bytes"):
        fetch(site.put("log", CONTENT, '"1"'), file, 1000)
    assert list(file.parent.iterdir()) == []
    assert len(site.asked) == 1


def test_a_length_that_is_not_announced_is_taken_as_it_comes(site, file):
    site.plan = ["unannounced"]
    fetch(site.put("log", CONTENT), file, LIMIT)
    assert file.read_bytes() == CONTENT


@pytest.mark.parametrize(("status", "attempts"), [(404, 1), (403, 1), (503, 5), (429, 5)])
def test_an_answer_of_the_server_is_told_and_tried_again_where_that_may_help(
    site, file, status, attempts
):
    site.plan = [status] * 5
    with pytest.raises(DownloadError, match=rf"the server answered {status}"):
        fetch(site.put("log", CONTENT), file, LIMIT)
    assert len(site.asked) == attempts


def test_nobody_at_home_is_told(file, monkeypatch):
    monkeypatch.setattr(fetching, "PAUSE", 0.0)
    with pytest.raises(DownloadError, match=r"http://127\.0\.0\.1:1/log broke off after 0 bytes"):
        fetch("http://127.0.0.1:1/log", file, LIMIT)


def test_a_redirection_on_this_machine_is_followed(site, file):
    site.target = site.put("log", CONTENT)
    site.plan = ["elsewhere"]
    fetch(site.url("old"), file, LIMIT)
    assert file.read_bytes() == CONTENT


@pytest.mark.parametrize(
    "target",
    ["http://example.org/log", "ftp://example.org/log", "file:///etc/passwd", "http://[x/log"],
)
def test_a_redirection_to_what_is_not_https_is_refused(site, file, target):
    site.target = target
    site.plan = ["elsewhere"]
    with pytest.raises(
        DownloadError, match=r"expected an https address|not allowed|leads to nowhere"
    ):
        fetch(site.url("old"), file, LIMIT)
    assert not file.exists()


def test_redirections_without_end_are_told(site, file):
    site.target = site.url("old")
    site.plan = ["elsewhere"] * 100
    with pytest.raises(DownloadError, match="302"):
        fetch(site.url("old"), file, LIMIT)
    assert len(site.asked) < 30


def test_what_is_encoded_on_the_way_is_refused(site, file):
    site.plan = ["packed"]
    with pytest.raises(DownloadError, match="encodes as 'gzip'"):
        fetch(site.put("log", CONTENT), file, LIMIT)


@pytest.mark.parametrize(
    "url", ["http://example.org/x", "file:///etc/passwd", "https://", "log", "https://[x"]
)
def test_only_https_addresses_are_fetched(file, url):
    with pytest.raises(DownloadError, match=r"expected an https address|is no address"):
        fetch(url, file, LIMIT)
