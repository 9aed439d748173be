"""A CSV file with malformed records, read around them: each becomes a row of nulls, and is told."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
from kedro.io import DatasetError
from polars.exceptions import PanicException, PolarsError

from sce_pipeline.datasets.csv_faults import LONGEST_RECORD, open_log, read_records
from sce_pipeline.datasets.gzip_bombs import end_of_records
from sce_pipeline.interactions.columns import MALFORMED, MALFORMED_RECORD, ROW
from sce_pipeline.interactions.rejections import MISPLACED_QUOTE, NOT_UTF_8, TOO_MANY_VALUES

_BLOCK = 2**23  # bytes that are read at once; what is parsed at once is at most some times as much
_SHOWN = 1000  # characters of a malformed record that are handed on

_BEYOND_ASCII = 0x80
_AROUND_VALUES = np.frombuffer(b',\n"', np.uint8)  # a quote beside another stands for one
_DELIMITER = re.compile(rb"[,\n]")
_QUOTE_OR_DELIMITER = re.compile(rb'[",\n]')


class _Records(NamedTuple):
    """What a text holds.

    Attributes:
        sound: The text with a blank line, of which Polars makes nulls, for each malformed record.
        n_rows: How many records there are.
        malformed: What is wrong and the beginning of the text, for each place of such a record.
        rest: What is left of the text after the last record that ends in it.
    """

    sound: bytes
    n_rows: int
    malformed: dict[int, tuple[str, str]]
    rest: bytes


def read_around_malformed(file: Path) -> Iterator[pl.DataFrame]:
    """Read a file part after part, in memory for some parts, whatever is wrong with its records.

    Polars reads the parts. Only in those that it cannot read, lines that may be at fault are looked
    at one by one. A quote that is misplaced, or that nothing closes, costs the line at which it
    stands: reading goes on at the next. Quotes amid the values of a record are part of them where
    their number is even, as Polars has it.

    Args:
        file: With a sound header, plain or gzipped.

    Yields:
        The columns of the file (String), ``row`` (Int64, the place in the file), and of malformed
        records, whose other columns are null, what is wrong and the beginning of the text (String,
        null for the others).

    Raises:
        DatasetError: A line has ``LONGEST_RECORD`` bytes or more.
        OSError, EOFError, zlib.error: The archive is damaged.
    """
    n_rows, n_lines, rest, is_last = 0, 0, b"", False
    with open_log(file) as stream:
        header = b""
        for _, record in read_records(stream):  # empty lines may come before the header
            n_lines += record.count(b"\n")
            header = record.removeprefix(codecs.BOM_UTF8)
            if header.strip(b"\r\n"):
                break
        n_columns = pl.read_csv(header, infer_schema=False).width
        while not is_last:
            block = stream.read(_BLOCK)
            is_last = not block
            text = rest + block
            if is_last and text and not text.endswith(b"\n"):
                text += b"\n"
            _refuse_long_line(file, n_lines + 1, text)
            frame, rest = _read_part(header, text, n_columns, is_last)
            n_lines += text.count(b"\n") - rest.count(b"\n")
            if not frame.is_empty():
                yield frame.with_columns(pl.int_range(pl.len()).alias(ROW) + n_rows)
            n_rows += len(frame)


def _refuse_long_line(file: Path, first: int, text: bytes) -> None:
    if len(text) < LONGEST_RECORD:
        return
    for line, content in enumerate(text.split(b"\n"), first):
        if len(content) >= LONGEST_RECORD:
            raise DatasetError(
                f"{file}: line {line} begins a record of {LONGEST_RECORD:,} bytes or more, which "
                "no log has"
            )


def _read_part(
    header: bytes, text: bytes, n_columns: int, is_last: bool
) -> tuple[pl.DataFrame, bytes]:
    """Read the records that end in a text, and return what is left of it."""
    end = end_of_records(text, is_quoted=text.count(b'"') % 2 == 1)
    if (end == len(text) if is_last else end > 0) and (
        frame := _read_if_sound(header, text[:end])
    ) is not None:
        null = pl.lit(None, pl.String)
        told = frame.with_columns(null.alias(MALFORMED), null.alias(MALFORMED_RECORD))
        return told, text[end:]
    found = _set_aside(text, n_columns, is_last)
    frame = pl.read_csv(header + found.sound, infer_schema=False)
    return pl.concat([frame, _tabulate(found)], how="horizontal"), found.rest


def _read_if_sound(header: bytes, text: bytes) -> pl.DataFrame | None:
    """Read whole records; None if Polars cannot, or if a misplaced quote may hide some of them."""
    try:
        frame = pl.read_csv(header + text, infer_schema=False)
    except (PolarsError, PanicException):
        return None
    if len(frame) == text.count(b"\n"):  # no quotes hide a line
        return frame
    quotes, ends = _find_all(b'"', text), _find_all(b"\n", text)
    n_records = np.count_nonzero(np.searchsorted(quotes, ends) % 2 == 0)
    is_sound = not _are_misplaced(text, quotes, np.zeros_like(quotes)).any()
    return frame if is_sound and len(frame) == n_records else None


def _tabulate(found: _Records) -> pl.DataFrame:
    told: list[tuple[str, str] | tuple[None, None]] = [(None, None)] * found.n_rows
    for row, what in found.malformed.items():
        told[row] = what
    schema = {MALFORMED: pl.String, MALFORMED_RECORD: pl.String}
    return pl.DataFrame(told, schema=schema, orient="row")


def _set_aside(text: bytes, n_columns: int, is_last: bool) -> _Records:
    """Tell the records of a text apart, up to the last that ends in it."""
    ends = _find_all(b"\n", text) + 1
    starts = np.concatenate([[0], ends])
    stop = int(starts[-1])
    sound: list[bytes] = []
    malformed: dict[int, tuple[str, str]] = {}
    n_rows = line = sound_start = 0
    for suspect in _suspects(text, ends, n_columns).tolist():
        if suspect < line:  # one of the lines of the last record
            continue
        start, line_end = int(starts[suspect]), int(ends[suspect])
        n_rows, line = n_rows + suspect - line, suspect
        found = _end_of_record(text, start, line_end, n_columns)
        if found is None and not is_last and len(text) - start < LONGEST_RECORD:
            stop = start  # its end is still to be read
            break
        end, reason = found or (line_end, MISPLACED_QUOTE)
        record = text[start:end]
        if reason is None and not _is_utf_8(record):
            reason = NOT_UTF_8
        if reason is not None:
            shown = record[: 4 * _SHOWN].decode(errors="replace").rstrip("\r\n")
            malformed[n_rows] = (reason, shown[:_SHOWN])
            sound += [text[sound_start:start], b"\n"]
            sound_start = end
        n_rows, line = n_rows + 1, line + record.count(b"\n")
    else:
        n_rows += len(ends) - line
    sound.append(text[sound_start:stop])
    return _Records(b"".join(sound), n_rows, malformed, text[stop:])


def _suspects(text: bytes, ends: np.ndarray, n_columns: int) -> np.ndarray:
    """Number the lines that may be no sound record: all others are one, if one begins there.

    They have too many commas, bytes beyond ASCII, or quotes that are not those of whole values.
    """
    commas = np.diff(np.searchsorted(_find_all(b",", text), ends), prepend=0)
    quotes = _find_all(b'"', text)
    line_of = np.searchsorted(ends, quotes, side="right")
    quotes, line_of = quotes[line_of < len(ends)], line_of[line_of < len(ends)]
    quotes_before = np.searchsorted(quotes, ends)
    n_quotes = np.diff(quotes_before, prepend=0)
    is_suspect = (commas >= n_columns) | (n_quotes % 2 == 1)
    first = (quotes_before - n_quotes)[line_of]
    is_suspect[line_of[_are_misplaced(text, quotes, first)]] = True
    foreign = np.flatnonzero(np.frombuffer(text, np.uint8) >= _BEYOND_ASCII)
    lines = np.searchsorted(ends, foreign, side="right")
    is_suspect[lines[lines < len(ends)]] = True
    return np.flatnonzero(is_suspect)


def _are_misplaced(text: bytes, quotes: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Tell the quotes that neither open nor close a whole value, nor stand for a quote in one.

    Args:
        text: What they stand in.
        quotes: Their places.
        first: The number, for each, of the first that belongs to the same record: this one opens a
            value, the next closes it, and so on.
    """
    characters = np.frombuffer(b"\n" + text + b"\n\n", np.uint8)
    before, after, later = (characters[quotes + shift] for shift in (0, 2, 3))
    opens = (np.arange(len(quotes)) - first) % 2 == 0
    ends_value = np.isin(after, _AROUND_VALUES) | ((after == ord("\r")) & (later == ord("\n")))
    return ~np.where(opens, np.isin(before, _AROUND_VALUES), ends_value)


def _find_all(character: bytes, text: bytes) -> np.ndarray:
    return np.flatnonzero(np.frombuffer(text, np.uint8) == ord(character))


def _end_of_record(
    text: bytes, start: int, line_end: int, n_columns: int
) -> tuple[int, str | None] | None:
    """Return the place after the record that begins at another, and what is wrong with its values.

    A record with a misplaced quote ends with its first line. None where its end is not in the text,
    as where nothing closes a quote.
    """
    if text.find(b'"', start, line_end) < 0:
        n_values = text.count(b",", start, line_end) + 1
        return line_end, TOO_MANY_VALUES if n_values > n_columns else None
    n_values, is_odd, end = 0, False, start - 1
    while n_values == 0 or text.startswith(b",", end):
        start = end + 1
        is_quoted = text.startswith(b'"', start)
        end = _end_of_value(text, start)
        if end == len(text):
            return None
        value = text[start:end]
        is_closed = value.removesuffix(b"\r").endswith(b'"')
        if is_quoted and (not is_closed or (is_odd and b"\n" in value)):
            return line_end, MISPLACED_QUOTE
        is_odd ^= value.count(b'"') % 2 == 1
        n_values += 1
    if is_odd:
        return line_end, MISPLACED_QUOTE
    return end + 1, TOO_MANY_VALUES if n_values > n_columns else None


def _end_of_value(text: bytes, start: int) -> int:
    """Find where a value ends, the end of the text where nothing closes its quotes."""
    if not text.startswith(b'"', start):
        return _find(_DELIMITER, text, start)
    end = start
    while text.startswith(b'"', end):
        closing = text.find(b'"', end + 1)
        if closing < 0:
            return len(text)
        end = _find(_QUOTE_OR_DELIMITER, text, closing + 1)
    return end


def _find(pattern: re.Pattern[bytes], text: bytes, start: int) -> int:
    found = pattern.search(text, start)
    return found.start() if found else len(text)


def _is_utf_8(record: bytes) -> bool:
    if record.isascii():
        return True
    try:
        record.decode()
    except UnicodeDecodeError:
        return False
    return True
