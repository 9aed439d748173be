from __future__ import annotations

import gzip

from hypothesis import given
from hypothesis import strategies as st

from sce_pipeline.datasets import gzip_bombs
from sce_pipeline.datasets.gzip_bombs import find_long_record

PIECES = [b"1", b"\n", b'"', b",", b"2222", b'"a\nb"', b"\n\n"]


def records(text):
    """The line at which each record begins, and its length, read byte by byte."""
    found, line, first, size, is_quoted = [], 1, 1, 0, False
    for byte in text:
        size += 1
        is_quoted ^= byte == ord('"')
        if byte == ord("\n"):
            line += 1
            if not is_quoted:
                found.append((first, size))
                first, size = line, 0
    return [*found, (first, size)]


@given(
    st.lists(st.sampled_from(PIECES), max_size=60).map(b"".join),
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(0, 60),
)
def test_a_record_is_found_that_is_longer_by_a_block_and_none_that_is_shorter(
    tmp_path_factory, text, size, block, cut
):
    file = tmp_path_factory.getbasetemp() / "log.csv.gz"
    file.write_bytes(gzip.compress(text[:cut]) + gzip.compress(text[cut:]))
    original, gzip_bombs._BLOCK = gzip_bombs._BLOCK, block
    try:
        line = find_long_record(file, size)
    finally:
        gzip_bombs._BLOCK = original
    long = [first for first, length in records(text) if length >= size]
    certain = [first for first, length in records(text) if length >= size + min(block, size)]
    assert line in [*long, None]
    assert line is not None or not certain
    assert not certain or line <= certain[0]
