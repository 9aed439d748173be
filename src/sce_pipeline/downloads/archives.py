"""What archives hold, taken out within bounds and to places of our own choosing."""

from __future__ import annotations

import gzip
import stat
import zipfile
import zlib
from pathlib import Path
from typing import IO, cast

from sce_pipeline.downloads.errors import DownloadError

_BLOCK = 2**20
_ENCRYPTED = 0x1


def extract(archive: Path, member: str, target: Path, limit: int) -> None:
    """Take one file out of a zip archive.

    It is found by its whole name and written to ``target``, so nothing that the archive says
    decides about a place; other members are not looked at.

    Raises:
        DownloadError: The archive is damaged, lacks the file or has it twice, or the file is a
            link, encrypted or larger than ``limit`` bytes.
    """
    part = target.with_name(target.name + ".part")
    try:
        with zipfile.ZipFile(archive) as opened:
            info = _find(opened, archive, member)
            with opened.open(info) as source, part.open("wb") as stream:
                _copy(source, stream, f"{member} in {archive}", limit)
        part.replace(target)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise DownloadError(f"{archive} is no whole zip archive: {error}") from error
    finally:
        part.unlink(missing_ok=True)


def check_gzip(file: Path, limit: int) -> None:
    """Unpack a gzipped file once, to nowhere.

    Raises:
        DownloadError: It is damaged, or unpacks to more than ``limit`` bytes.
    """
    try:
        with gzip.open(file) as source:
            _copy(cast("IO[bytes]", source), None, str(file), limit)
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DownloadError(f"{file} is no whole gzip file: {error}") from error


def _find(opened: zipfile.ZipFile, archive: Path, member: str) -> zipfile.ZipInfo:
    found = [info for info in opened.infolist() if info.filename == member]
    if len(found) != 1:
        names = ", ".join(repr(name) for name in opened.namelist()[:20])
        raise DownloadError(
            f"{archive} has {len(found)} files {member!r}, expected one; in it are {names}"
        )
    (info,) = found
    if stat.S_ISLNK(info.external_attr >> 16):
        raise DownloadError(f"{member} in {archive} is a link, expected a file")
    if info.flag_bits & _ENCRYPTED:
        raise DownloadError(f"{member} in {archive} is encrypted, expected a file to read")
    return info


def _copy(source: IO[bytes], target: IO[bytes] | None, name: str, limit: int) -> None:
    size = 0
    while block := source.read(_BLOCK):
        size += len(block)
        if size > limit:
            raise DownloadError(f"{name} unpacks to more than the {limit:,} bytes expected")
        if target is not None:
            target.write(block)
