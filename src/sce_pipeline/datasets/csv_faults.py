"""Where a CSV file is at fault: rows are looked at once reading them has failed, never before."""

from __future__ import annotations

import codecs
import gzip
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import dropwhile, islice
from pathlib import Path
from typing import BinaryIO, cast

from sce_pipeline.interactions.rejections import REMEDY

LONGEST_RECORD = 2**24
"""Bytes of the longest record that is read: more is a bomb or a quote that nothing closes."""

_SHOWN = 60  # characters of a value in a message
_QUOTED = re.compile(rb'"(?:[^"]|"")*"')
_FIELD = re.compile(rb'("(?:[^"]|"")*"[^,]*|[^,]*)(,|\Z)')


def find_fault(file: Path) -> str | None:
    """Say what is wrong with the first record at fault, and where; None if nothing is found.

    Whoever reads the message sees the line of the file, counted from 1, the column by name, the
    value and what was expected.
    """
    try:
        with open_log(file) as stream:
            return _first_fault(read_records(stream))
    except (OSError, EOFError, zlib.error):  # a damaged archive, which its reader has told
        return None


def find_header_fault(file: Path) -> str | None:
    """Do the same for the header alone: a quote amid it would hide the rows below it."""
    with open_log(file) as stream:
        records = dropwhile(lambda record: not record[1].strip(b"\r\n"), read_records(stream))
        return _first_fault(islice(records, 1))


@contextmanager
def open_log(file: Path) -> Iterator[BinaryIO]:
    """Open a file for reading bytes, through gzip where it is gzipped, whatever its name."""
    with file.open("rb") as stream:
        is_gzipped = stream.read(2) == b"\x1f\x8b"
    with gzip.open(file) if is_gzipped else file.open("rb") as stream:
        yield cast("BinaryIO", stream)


def read_records(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield the line at which each record begins, and the record with the lines it is quoted over.

    A record that is longer than any should be is cut, and is the last.
    """
    parts: list[bytes] = []
    first, size, quotes = 1, 0, 0
    for line, part in enumerate(iter(lambda: stream.readline(LONGEST_RECORD), b""), 1):
        parts.append(part)
        size += len(part)
        quotes += part.count(b'"')
        if size >= LONGEST_RECORD:
            break
        if quotes % 2 == 0:
            yield first, b"".join(parts)
            parts, first, size, quotes = [], line + 1, 0, 0
    if parts:
        yield first, b"".join(parts)


def _first_fault(records: Iterator[tuple[int, bytes]]) -> str | None:
    names: list[str] = []
    for line, record in records:
        if len(record) >= LONGEST_RECORD:
            return (
                f"line {line} begins a record of {LONGEST_RECORD:,} bytes or more, "
                f"{_show(record)}: is a quote not closed?"
            )
        fields = _split(record if names else record.removeprefix(codecs.BOM_UTF8))
        if not names and fields != [b""]:  # empty lines may come before the header
            names = [_show(field) for field in fields]
        if names and (fault := _fault_of(fields, names)):
            return f"line {line}, {fault}"
    return None


def _split(record: bytes) -> list[bytes]:
    record = record.removesuffix(b"\n").removesuffix(b"\r")
    if b'"' not in record:
        return record.split(b",")
    fields = []
    for match in _FIELD.finditer(record):
        fields.append(match[1])
        if not match[2]:
            break
    return fields


def _fault_of(fields: list[bytes], names: list[str]) -> str | None:
    for field, name in zip(fields, names, strict=False):
        try:
            field.decode()
        except UnicodeDecodeError as error:
            return (
                f"column {name}: {_show(field)} is not UTF-8 (byte {error.start + 1} of it is "
                f"0x{field[error.start]:02x}); {REMEDY}"
            )
        if b'"' in field and not _QUOTED.fullmatch(field):
            return (
                f"column {name}: {_show(field)} has a quote that is not closed or not doubled; "
                'expected "…" around the whole value and "" for a quote in it'
            )
    if len(fields) > len(names):
        return (
            f"after column {names[-1]}: expected {len(names)} values, found {len(fields)}, the "
            f"first too many being {_show(fields[len(names)])}; put values with commas in quotes"
        )
    return None


def _show(value: bytes) -> str:
    more = "…" if len(value) > _SHOWN else ""
    value = value[:_SHOWN]
    try:
        return repr(value.decode()) + more
    except UnicodeDecodeError:
        return repr(value)[1:] + more
