"""A file over HTTP, resumed where it broke off, and in place only once it is whole."""

from __future__ import annotations

import hashlib
import http.client
import json
import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, OpenerDirector, Request, build_opener

from sce_pipeline.downloads.errors import DownloadError

logger = logging.getLogger(__name__)

ATTEMPTS = 5
TIMEOUT = 30.0  # seconds without a byte
PAUSE = 2.0  # seconds before the second attempt; doubled before each other
_BLOCK = 2**20
_REPORT_EVERY = 10.0  # seconds
_PARTIAL, _NOT_SATISFIABLE = 206, 416
_WORTH_ANOTHER_TRY = {408, 429, 500, 502, 503, 504}
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
_LOCAL = {"localhost", "127.0.0.1", "::1"}


class _BrokenOffError(Exception):
    """What came is good as far as it goes."""


class _StartOverError(Exception):
    """What came so far is of no use."""


class _SafeRedirects(HTTPRedirectHandler):
    def redirect_request(self, req: Request, *answer: Any) -> Request | None:
        _require_safe(answer[-1], came_from=req.full_url)
        return super().redirect_request(req, *answer)


def fetch(url: str, file: Path, limit: int) -> None:
    """Download a file, or go on where an earlier download broke off.

    What there is of it lies in ``<file>.part``, with what the server said of its version in
    ``<file>.part.json``: it is gone on with only if the server has the same version still.

    Args:
        url: An https address; http is taken from this machine alone.
        file: Where to put it; its folder exists.
        limit: Bytes that it may have.

    Raises:
        DownloadError: It cannot be had, or is larger than it may be.
    """
    _require_safe(url)
    opener, part = build_opener(_SafeRedirects), _Part(file)
    problem = "nothing was tried"
    for attempt in range(ATTEMPTS):
        if attempt:
            logger.warning("%s; trying again", problem)
            time.sleep(PAUSE * 2 ** (attempt - 1))
        try:
            _fetch_once(opener, url, part, limit)
        except _BrokenOffError as error:
            problem = f"{url} broke off after {part.size:,} bytes: {error}"
        except _StartOverError as error:
            part.remove()
            problem = f"{url} has to be started over: {error}"
        else:
            part.finish(file)
            return
    raise DownloadError(
        f"{problem}; gave up after {ATTEMPTS} attempts. The same command goes on from here"
    )


def digest(file: Path, algorithm: str) -> str:
    """Return a file's checksum in hexadecimal digits."""
    checksum = hashlib.new(algorithm, usedforsecurity=False)
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            checksum.update(block)
    return checksum.hexdigest()


class _Part:
    """What has come of a file so far, and of which version of it."""

    def __init__(self, file: Path) -> None:
        self.file = file.with_name(file.name + ".part")
        self._record = file.with_name(file.name + ".part.json")

    @property
    def size(self) -> int:
        return self.file.stat().st_size if self.file.exists() else 0

    def version(self, url: str) -> str | None:
        """What the server calls the version of the part, if it can be gone on with."""
        try:
            record = json.loads(self._record.read_text())
            return str(record["version"]) if record["url"] == url and self.size else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def begin(self, url: str, version: str | None) -> None:
        self.remove()
        if version is not None:
            self._record.write_text(json.dumps({"url": url, "version": version}))

    def finish(self, file: Path) -> None:
        self.file.replace(file)
        self._record.unlink(missing_ok=True)

    def remove(self) -> None:
        self.file.unlink(missing_ok=True)
        self._record.unlink(missing_ok=True)


def _fetch_once(opener: OpenerDirector, url: str, part: _Part, limit: int) -> None:
    headers = {"Accept-Encoding": "identity", "User-Agent": "sce-pipeline"}
    version = part.version(url)
    if version is not None:
        headers |= {"Range": f"bytes={part.size}-", "If-Range": version}
    with _naming(url), _open(opener, Request(url, headers=headers)) as response:  # noqa: S310
        start, total = _place_of(response)
        if version is None or response.status != _PARTIAL:
            part.begin(url, _version_of(response))
        elif _version_of(response) not in (version, None):
            raise _StartOverError("the server has another version than began to come")
        if start != part.size:
            raise _StartOverError("the server sent another part than asked for")
        if total is not None and total > limit:
            part.remove()
            raise DownloadError(f"{url} has {total:,} bytes, expected at most {limit:,}")
        _receive(response, url, part, total, limit)


def _open(opener: OpenerDirector, request: Request) -> http.client.HTTPResponse:
    with _connected():
        response: http.client.HTTPResponse = opener.open(request, timeout=TIMEOUT)
        return response


def _read(response: http.client.HTTPResponse) -> bytes:
    with _connected():
        return response.read1(_BLOCK)


@contextmanager
def _connected() -> Iterator[None]:
    """Take any failure of the connection for one that may pass: a reset, TLS or no way there.

    Nothing that fails with the file may come in here, as both are an ``OSError``.
    """
    try:
        yield
    except URLError:  # an answer, or a connection that was not made: it says so itself
        raise
    except OSError as error:
        raise _BrokenOffError(str(error) or type(error).__name__) from error


def _receive(
    response: http.client.HTTPResponse, url: str, part: _Part, total: int | None, limit: int
) -> None:
    size, reported = part.size, time.monotonic()
    with part.file.open("ab") as stream:
        while block := _read(response):
            size += len(block)
            if size > limit:
                part.remove()
                raise DownloadError(f"{url} goes on after the {limit:,} bytes that were expected")
            stream.write(block)
            if time.monotonic() - reported > _REPORT_EVERY:
                reported = time.monotonic()
                of = f" of {total / 1e6:,.0f}" if total is not None else ""
                logger.info("%s: %.0f%s MB", url, size / 1e6, of)
    if total is not None and size != total:
        if size > total:
            raise _StartOverError(f"{size:,} bytes came, {total:,} were announced")
        raise _BrokenOffError(f"{total:,} bytes were announced")


def _place_of(response: http.client.HTTPResponse) -> tuple[int, int | None]:
    """Tell at which byte a response begins, and how many the whole file has, if it says so."""
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding.strip().lower() != "identity":
        raise DownloadError(f"The server encodes as {encoding!r} what should come as it is")
    if response.status == _PARTIAL:
        match = _RANGE.fullmatch(response.headers.get("Content-Range", "").strip())
        if match is None:
            raise _StartOverError("the server does not say which part it sends")
        return int(match[1]), int(match[3])
    return 0, response.length


def _version_of(response: http.client.HTTPResponse) -> str | None:
    """A strong tag or a date of change: what If-Range takes."""
    tag = response.headers.get("ETag")
    if tag and not tag.startswith("W/"):
        return str(tag)
    return response.headers.get("Last-Modified")


@contextmanager
def _naming(url: str) -> Iterator[None]:
    """Sort what goes wrong by whether to try again."""
    try:
        yield
    except HTTPError as error:
        error.close()
        if error.code == _NOT_SATISFIABLE:
            raise _StartOverError("the server has fewer bytes than came before") from error
        if error.code in _WORTH_ANOTHER_TRY:
            raise _BrokenOffError(f"the server answered {error.code} {error.reason}") from error
        raise DownloadError(f"{url}: the server answered {error.code} {error.reason}") from error
    except URLError as error:
        raise _BrokenOffError(str(error.reason)) from error
    except http.client.IncompleteRead as error:
        raise _BrokenOffError("the connection was closed") from error
    except http.client.HTTPException as error:
        raise _BrokenOffError(str(error) or type(error).__name__) from error
    except ValueError as error:  # an address that is none
        raise DownloadError(f"{url} leads to nowhere: {error}") from error


def _require_safe(url: str, came_from: str | None = None) -> None:
    try:
        parts = urlsplit(url)
        host = parts.hostname
    except ValueError as error:
        raise DownloadError(f"{url!r} is no address") from error
    if parts.scheme == "https" and host:
        return
    is_local = parts.scheme == "http" and host in _LOCAL
    if is_local and (came_from is None or urlsplit(came_from).hostname in _LOCAL):
        return
    redirected = f"{came_from} redirects to " if came_from else ""
    raise DownloadError(f"{redirected}{url}: expected an https address")
