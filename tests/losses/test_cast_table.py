from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sce_pipeline.losses import cast_table
from sce_pipeline.losses.cast_table import CAST_BYTES, CastTable, casts_whole

HALVES = [torch.bfloat16, torch.float16]


def make_table(n_rows, d, dtype=torch.float32):
    return torch.randn(n_rows, d, generator=torch.Generator().manual_seed(0)).to(dtype)


@given(
    st.integers(1, 700),
    st.integers(1, 9),
    st.integers(1, 4000),
    st.sampled_from([torch.float32, *HALVES]),
    st.sampled_from(HALVES),
    st.booleans(),
)
def test_ranges_make_up_the_cast_and_none_is_too_large(n_rows, d, limit, of_table, dtype, wide):
    table = make_table(n_rows, d, of_table)
    expected = table.to(dtype)
    if wide:
        expected = expected.float()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cast_table, "CAST_BYTES", limit)
        cast = CastTable(table, dtype, wide=wide)
        found, stop = [], 0
        for rows, part in cast.ranges():
            assert rows.start == stop
            stop = rows.stop
            if of_table != dtype:
                row_bytes = d * expected.element_size()
                assert len(part) <= 1 or part.numel() * part.element_size() <= limit
                assert stop == n_rows or len(part) > limit // row_bytes - cast_table.BLOCK_ROWS
            found.append(part.clone())
        again = CastTable(cast.held, dtype, wide=wide)
        assert again.held is cast.held
        index = torch.tensor([n_rows - 1, 0])
        assert torch.equal(again.take(index), expected[index])
        torch.testing.assert_close(again.sum(), expected.float().sum(0), rtol=1e-4, atol=1e-3)
    assert torch.equal(torch.cat(found), expected)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_small_cast_is_kept_and_of_a_large_one_the_table(dtype, monkeypatch):
    table = make_table(300, 8)
    assert CastTable(table, dtype, wide=False).held.dtype == dtype
    monkeypatch.setattr(cast_table, "CAST_BYTES", 300 * 8 * 2 - 1)
    assert CastTable(table, dtype, wide=False).held is table


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_needs_no_cast_is_one_range_and_no_copy(dtype, monkeypatch):
    monkeypatch.setattr(cast_table, "CAST_BYTES", 16)
    table = make_table(300, 8, dtype)
    for wide in (False, True):
        ((rows, part),) = CastTable(table, dtype, wide=wide).ranges()
        assert rows == slice(0, 300)
        assert part is table


def test_ranges_start_at_whole_blocks(monkeypatch):
    monkeypatch.setattr(cast_table, "CAST_BYTES", 200 * 8 * 2)
    starts = [
        rows.start for rows, _ in CastTable(make_table(700, 8), HALVES[0], wide=False).ranges()
    ]
    assert starts == [0, 128, 256, 384, 512, 640]


def test_the_bound_is_a_quarter_of_a_gigabyte_whatever_the_table():
    assert CAST_BYTES == 256 * 2**20
    assert casts_whole(torch.empty(2**21, 64, device="meta"), torch.bfloat16)
    assert not casts_whole(torch.empty(2**21 + 1, 64, device="meta"), torch.bfloat16)
    assert casts_whole(torch.empty(2**24, 64, device="meta"), torch.float32)
