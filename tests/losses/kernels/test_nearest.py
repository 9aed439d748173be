from __future__ import annotations

import pytest
import torch

from sce_pipeline.losses.kernels import nearest
from sce_pipeline.losses.kernels.nearest import Rows, Tile, filtered_rows, nearest_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TILE = Tile(rows=16, centres=16, step=16, num_warps=4, num_stages=1)


def filtered(centres, rows, k, **options):
    (found,) = filtered_rows(centres, Rows(rows, k), **options)
    return found


def data(n_centres, n_rows, d, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(n_centres, d, generator=generator).to(DEVICE, dtype)
    rows = torch.randn(n_rows, d, generator=generator).to(DEVICE)
    return centres, rows


def assert_nearest(found, centres, rows, k):
    """They are k distinct rows, and none left out has a larger product, but for rounding."""
    assert found.shape == (len(centres), k)
    assert found.dtype == torch.int64
    assert found.min() >= 0
    assert found.max() < len(rows)
    assert (found.sort().values.diff() > 0).all()
    products = centres.double() @ rows.to(centres.dtype).double().T
    kth = products.topk(k).values[:, -1:]
    assert (products.gather(1, found) >= kth - 1e-5 * (1 + kth.abs())).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("n_centres", "n_rows", "d", "k"),
    [(1, 1, 1, 1), (3, 70, 20, 70), (17, 601, 16, 5), (5, 500, 100, 40)],
)
def test_nearest_rows(dtype, n_centres, n_rows, d, k):
    centres, rows = data(n_centres, n_rows, d, dtype)
    assert_nearest(filtered(centres, rows, k), centres, rows, k)


def test_programs_take_many_tiles_of_rows(monkeypatch):
    monkeypatch.setattr(nearest, "PROGRAMS", 1)
    centres, rows = data(20, 400, 8)
    assert_nearest(filtered(centres, rows, 6, tile=TILE), centres, rows, 6)


def test_wide_rows_of_float32_are_multiplied_part_by_part():
    centres, rows = data(4, 200, 70)
    assert nearest.tile_of(70, torch.float32, torch.float32).step < 70
    assert_nearest(filtered(centres, rows, 9), centres, rows, 9)


@pytest.mark.parametrize("k", [1, 7, 130])
def test_rows_that_all_tie_are_distinct(k):
    centres, rows = data(3, 130, 8)
    assert_nearest(filtered(centres, torch.zeros_like(rows), k), centres, rows * 0, k)


def test_ties_do_not_displace_a_larger_product():
    centres, rows = data(3, 200, 8)
    rows[:] = rows[0]
    best = torch.tensor([3, 100, 199], device=DEVICE)
    rows[best] = 100 * centres  # row i is the best of centre i, of the others' perhaps not
    found = filtered(centres, rows, 20)
    assert_nearest(found, centres, rows, 20)
    assert (found == best[:, None]).any(1).all()


def test_more_rows_above_the_bound_than_there_is_room_for(monkeypatch):
    # Rows of one group are the largest there are, so the bound is far too low.
    monkeypatch.setattr(nearest, "PROGRAMS", 1)
    centres = torch.ones(1, 1, device=DEVICE)
    rows = torch.linspace(0, 1, 1600, device=DEVICE)[:, None].clone()
    rows[::32] += 1000  # n_groups is 32: all of them fall in group 0
    found = filtered(centres, rows, 8, tile=TILE)
    room = 32 - 8
    assert (rows[:, 0] > rows[1::32, 0].max()).sum() > room
    assert (found.sort().values.diff() > 0).all()
    assert rows[found, 0].min() > 0.9


def test_nan_is_never_preferred():
    centres, rows = data(3, 200, 8)
    rows[::4] = torch.nan
    found = filtered(centres, rows, 170)
    assert (found.sort().values.diff() > 0).all()
    assert ((found % 4 != 0).sum(1) == 150).all()
    assert (filtered(centres, rows[:64] * torch.nan, 9).sort().values.diff() > 0).all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # 0 times infinity
def test_infinities_are_in_order():
    centres = torch.ones(1, 1, device=DEVICE)
    rows = torch.arange(100.0, device=DEVICE)[:, None].clone()
    rows[5], rows[80:] = torch.inf, -torch.inf
    assert set(filtered(centres, rows, 3)[0].tolist()) == {5, 79, 78}
    assert len(set(filtered(centres, rows, 90)[0].tolist())) == 90


@pytest.mark.parametrize("few", [True, False])
def test_the_sizes_choose_who_finds_them(monkeypatch, few):
    centres, rows = data(6, 200, 12)
    seen = []

    def remember(*arguments, **options):
        seen.append(arguments)
        return filtered_rows(*arguments, **options)

    monkeypatch.setattr(nearest, "FEW_ROWS", 200 if few else 199)
    monkeypatch.setattr(nearest, "filtered_rows", remember)
    assert_nearest(nearest_rows(centres, Rows(rows, 10))[0], centres, rows, 10)
    assert bool(seen) != few


def test_inner_products_never_stand_whole(monkeypatch, largest_tensor):
    monkeypatch.setattr(nearest, "PROGRAMS", 1)
    centres, rows = data(60, 2000, 1)
    with largest_tensor() as largest:
        filtered(centres, rows, 2, tile=Tile(128, 64, 16, num_warps=8, num_stages=1))
    assert largest.elements < 60 * 2000 / 2


def test_rows_and_centres_need_not_be_contiguous(monkeypatch):
    monkeypatch.setattr(nearest, "FEW_ROWS", 0)
    centres, rows = data(4, 90, 8)
    (found,) = nearest_rows(centres.T.contiguous().T, Rows(rows.T.contiguous().T, 5))
    assert_nearest(found, centres, rows, 5)


@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("bfloat16", "float32")])
@pytest.mark.parametrize("sizes", [((70, 9), (601, 40)), ((601, 3), (33, 33)), ((1, 1), (90, 5))])
def test_two_searches_go_together(monkeypatch, sizes, dtypes):
    monkeypatch.setattr(nearest, "PROGRAMS", 8)
    centres, _ = data(19, 1, 20, torch.bfloat16)
    searches = [
        Rows(data(1, n_rows, 20, seed=seed)[1].to(getattr(torch, dtype)), k)
        for seed, ((n_rows, k), dtype) in enumerate(zip(sizes, dtypes, strict=True))
    ]
    both = filtered_rows(centres, *searches)
    for found, (rows, k) in zip(both, searches, strict=True):
        assert_nearest(found, centres, rows, k)


@pytest.mark.parametrize("few", [0, 100, 1000])
def test_each_search_is_made_as_its_size_asks(monkeypatch, few):
    monkeypatch.setattr(nearest, "FEW_ROWS", few)
    centres, small = data(6, 90, 12)
    large = data(1, 200, 12, seed=1)[1]
    for searches in ([Rows(small, 4), Rows(large, 7)], [Rows(large, 7), Rows(small, 4)]):
        both = nearest_rows(centres, *searches)
        for found, (rows, k) in zip(both, searches, strict=True):
            assert_nearest(found, centres, rows, k)
