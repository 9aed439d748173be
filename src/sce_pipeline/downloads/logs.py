"""A public log on this machine: fetched, checked, and under its terms."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from filelock import FileLock, Timeout

from sce_pipeline.downloads.errors import DownloadError
from sce_pipeline.downloads.fetching import digest, fetch
from sce_pipeline.downloads.sources import Source

logger = logging.getLogger(__name__)

_CHECKSUM_LIMIT = 10_000  # bytes
_MD5 = re.compile(r"\b[0-9a-fA-F]{32}\b")


def obtain(source: Source, folder: Path) -> Path:
    """Bring a log's file to a folder, unless it is there, and return its path.

    A new file is checked against the publisher's checksum where there is one. Its SHA-256 is then
    written beside it, and whatever has its name later must have that: so a file that changes, here
    or at its publisher's, is noticed even without a published checksum.

    Raises:
        DownloadError: The file cannot be had or is not what it should be.
    """
    logger.info("%s, described at %s. %s", source.url, source.page, source.terms)
    file = folder / source.filename
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock", timeout=0):
            if file.is_file():
                logger.info("%s is there already and is not fetched again", file)
            else:
                fetch(source.url, file, source.limit)
            _check(source, file)
            _write_terms(source, file)
    except Timeout as error:
        raise DownloadError(f"another run downloads to {folder}") from error
    except OSError as error:
        raise DownloadError(f"Cannot download to {folder}: {error}") from error
    return file


def is_obtained(source: Source, folder: Path) -> bool:
    """Tell whether a log's file was brought to a folder and is there still."""
    file = folder / source.filename
    return file.is_file() and record_of(file).is_file()


def record_of(file: Path) -> Path:
    """Return where the SHA-256 of a file is kept that was first seen."""
    return file.with_name(file.name + ".sha256")


def _check(source: Source, file: Path) -> None:
    record = record_of(file)
    seen = digest(file, "sha256")
    if record.is_file():
        first = record.read_text().split(maxsplit=1)[:1]
        if first != [seen]:
            raise DownloadError(
                f"{file} has the SHA-256 {seen}, not the one first seen, in {record}: it was "
                "changed, here or by its publisher. Remove both to take what there is now"
            )
        return
    if source.checksum_url is not None:
        beside = file.with_name(file.name + ".md5")
        fetch(source.checksum_url, beside, _CHECKSUM_LIMIT)
        answer = beside.read_text(encoding="utf-8", errors="replace")
        published = _MD5.search(answer)
        if published is None:
            raise DownloadError(
                f"{source.checksum_url} has no MD5 checksum; it says {answer[:60]!r}"
            )
        if (md5 := digest(file, "md5")) != published[0].lower():
            file.unlink()
            raise DownloadError(
                f"{source.url} came with the MD5 {md5}, expected {published[0].lower()} as "
                f"{source.checksum_url} says; it was removed, run again to fetch it anew"
            )
    else:
        logger.info("No checksum is published; %s keeps the one seen now, %s", record, seen)
    record.write_text(f"{seen}  {file.name}\n")


def _write_terms(source: Source, file: Path) -> None:
    file.with_name("TERMS.txt").write_text(
        f"{file.name}, {file.stat().st_size:,} bytes\n"
        f"From: {source.url}\n"
        f"Described at: {source.page}\n"
        f"Terms: {source.terms}\n",
        encoding="utf-8",
    )
