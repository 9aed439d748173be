"""Logs with a record that fills the memory, found before anything has to hold it."""

from __future__ import annotations

from pathlib import Path

from sce_pipeline.datasets.csv_faults import open_log

_BLOCK = 2**20


def find_long_record(file: Path, size: int) -> int | None:
    """Return the line at which the first record of ``size`` bytes or more begins, if there is one.

    The file is unpacked once, to nowhere. Nothing less would do: what stands at its end is the size
    of its last member alone, modulo 2^32, and a thousandth of a record's size can unpack to it.

    Args:
        file: Of text, plain or gzipped in one member or several.
        size: Records may be larger by less than 1 MB unnoticed, since only those are looked at that
            are open where a block of the file ends. Line breaks in quotes end no record.

    Returns:
        A line of the file, counted from 1.

    Raises:
        OSError, EOFError, zlib.error: The archive is damaged.
    """
    n_lines = n_open = 0
    first, is_quoted = 1, False
    with open_log(file) as stream:
        while block := stream.read(min(_BLOCK, size)):
            is_quoted ^= block.count(b'"') % 2 == 1
            n_lines += block.count(b"\n")
            if end := end_of_records(block, is_quoted):
                first, n_open = n_lines - block.count(b"\n", end) + 1, -end
            n_open += len(block)
            if n_open >= size:
                return first
    return None


def end_of_records(block: bytes, is_quoted: bool) -> int:
    """Return the place after the last record that ends in a block, 0 if none does.

    It is looked for backwards from the block's end, which is within quotes or not.
    """
    end = len(block)
    while (newline := block.rfind(b"\n", 0, end)) >= 0:
        is_quoted ^= block.count(b'"', newline, end) % 2 == 1
        if not is_quoted:
            return newline + 1
        end = max(0, block.rfind(b'"', 0, newline))  # where these quotes were opened
        is_quoted = False
    return 0
