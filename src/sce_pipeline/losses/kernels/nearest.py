"""The rows of largest inner product with each centre, without a matrix of inner products.

Two passes over the rows, each with its products on the tensor cores. The first keeps no more than
the largest product within each of several times k groups of rows. Of these maxima the k-th largest
is a lower bound of the k-th largest product, for k different rows reach it. The second pass makes
the same products again and lists the rows above that bound, about 1.1 k of them where the groups
are as good as random, and as many as are needed of those that equal it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sce_pipeline.losses.base import chunks
from sce_pipeline.losses.kernels.common import cdiv, launch, padded, power_of_2
from sce_pipeline.losses.kernels.rows import load_rows, row_products

FEW_ROWS = 2**12
"""Up to here the inner products of a centre take no more room than the maxima of groups would."""

MANY_NEAREST = 2**11
"""Beyond this many nearest rows, a centre's list of candidates is more than one program holds."""

GROUPS_PER_NEAREST = 4
"""Groups for each of the k rows to find: more find a closer bound, and take more room."""

PROGRAMS = 264
"""Programs to run at the least, two for each multiprocessor of an H100."""


class Tile(NamedTuple):
    """Rows and centres whose products a program makes at a time, and its options.

    Attributes:
        rows: Rows of a tile.
        centres: Centres of a tile.
        step: Columns multiplied at a time.
        num_warps: Warps of a program.
        num_stages: Tiles of rows on their way at a time.
    """

    rows: int
    centres: int
    step: int
    num_warps: int
    num_stages: int


def tile_of(d: int, dtype: torch.dtype, rows_dtype: torch.dtype) -> Tile:
    """Return a tile that stays in registers and shared memory, for factors of ``dtype``."""
    step = padded(d)
    if dtype == torch.float32 and step > 64:
        step = 32
    row_bytes = 64 * step * rows_dtype.itemsize
    return Tile(64, 64, step, num_warps=8, num_stages=max(1, min(3, 2**17 // row_bytes)))


def nearest_rows(centres: Tensor, rows: Tensor, k: int) -> Tensor:
    """Return the ``k`` rows of largest inner product with each centre, in any order.

    They are always ``k`` distinct rows; which ones is open among rows that tie. NaN counts as less
    than all else, or, where there are few rows, as more.

    Args:
        centres: [n_centres, d], in the dtype the products take their factors in.
        rows: [n_rows, d], floating; cast to the dtype of the centres as they are read.
        k: Rows to find for each centre, at most ``n_rows``.

    Returns:
        int64 [n_centres, k].
    """
    if len(rows) > FEW_ROWS and k <= MANY_NEAREST:
        return filtered_rows(centres.contiguous(), rows.contiguous(), k)
    factor = rows.to(centres.dtype).T
    found = [
        (centres[chunk] @ factor).topk(k, sorted=False).indices
        for chunk in chunks(len(centres), len(rows), rows.device)
    ]
    return torch.cat(found)


def filtered_rows(
    centres: Tensor,
    rows: Tensor,
    k: int,
    *,
    tile: Tile | None = None,
) -> Tensor:
    """Return what ``nearest_rows`` does, through the kernels whatever the sizes.

    A centre has room for at least 2 k candidates above its bound. If more came, which takes rows
    whose order conspires with that of the groups, it would choose among those that came first.

    Args:
        centres: [n_centres, d], contiguous.
        rows: [n_rows, d], contiguous.
        k: Rows to find for each centre.
        tile: ``tile_of`` the sizes, if not given.
    """
    n_centres, d = centres.shape
    n_rows, device = len(rows), rows.device
    tile = tile or tile_of(d, centres.dtype, rows.dtype)
    centre_tiles, row_tiles = cdiv(n_centres, tile.centres), cdiv(n_rows, tile.rows)
    strides = max(cdiv(GROUPS_PER_NEAREST * k, tile.rows), cdiv(PROGRAMS, centre_tiles))
    strides = min(strides, row_tiles)
    n_groups = strides * tile.rows
    room = power_of_2(3 * k)
    sizes = {"D": d, "STEP": tile.step, "ROWS": tile.rows, "CENTRES": tile.centres}
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}

    maxima = torch.empty(n_centres, n_groups, dtype=torch.float32, device=device)
    launch(
        _group_maxima,
        (centre_tiles, strides),
        centres,
        rows,
        maxima,
        n_centres,
        n_rows,
        **sizes,
        **options,
    )
    # Candidates above the bound and of those at it, and the bits of the bound, for each centre.
    counts = torch.empty(3, n_centres, dtype=torch.int32, device=device)
    launch(
        _bounds,
        (n_centres,),
        maxima,
        counts,
        n_centres,
        n_groups,
        k,
        BLOCK=power_of_2(n_groups),
        num_warps=8,
    )
    del maxima
    # The candidates, and the bits of their products.
    candidates = torch.empty(2, n_centres, room, dtype=torch.int32, device=device)
    launch(
        _candidates,
        (centre_tiles, min(row_tiles, max(1, 4 * PROGRAMS // centre_tiles))),
        centres,
        rows,
        counts,
        candidates,
        n_centres,
        n_rows,
        k,
        ROOM=room,
        **sizes,
        **options,
    )
    found = torch.empty(n_centres, k, dtype=torch.int64, device=device)
    launch(
        _largest,
        (n_centres,),
        counts,
        candidates,
        found,
        n_centres,
        k,
        ROOM=room,
        num_warps=max(4, min(16, room // 1024)),
    )
    return found


@triton.jit
def _products(
    factor, centres, centre, n_centres, rows, row, n_rows, D: tl.constexpr, STEP: tl.constexpr
):
    """Return the products of rows and centres, -inf for NaN and beyond the last row.

    Both passes call this with tiles of the same shape, so that they see the same bits.
    """
    products = row_products(
        factor,
        centres,
        centre,
        centre < n_centres,
        rows,
        row,
        row < n_rows,
        D,
        STEP,
        centres.dtype.element_ty,
    )
    return tl.where((row < n_rows)[None, :] & (products == products), products, -float("inf"))


@triton.jit(do_not_specialize=["n_centres", "n_rows"])
def _group_maxima(
    centres,
    rows,
    maxima,
    n_centres,
    n_rows,
    D: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    CENTRES: tl.constexpr,
):
    """The largest product of each centre in each group; a group is every so many-th row."""
    centre = tl.program_id(0) * CENTRES + tl.arange(0, CENTRES)
    group = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    step = tl.num_programs(1) * ROWS
    factor = load_rows(centres, centre, centre < n_centres, 0, D, STEP)
    largest = tl.full([CENTRES, ROWS], -float("inf"), tl.float32)
    for start in range(0, n_rows, step):
        row = start + group
        products = _products(factor, centres, centre, n_centres, rows, row, n_rows, D, STEP)
        largest = tl.maximum(largest, products)
    pointers = maxima + centre.to(tl.int64)[:, None] * step + group[None, :]
    tl.store(pointers, largest, mask=(centre < n_centres)[:, None])


@triton.jit
def _sortable(values):
    """Return uint32 that compare as the float32 ``values`` do; none of them is 0."""
    bits = values.to(tl.uint32, bitcast=True)
    return tl.where(bits >> 31 == 1, ~bits, bits | 0x80000000)


@triton.jit
def _kth_largest(keys, k):
    """Return the k-th largest of ``keys``, bit by bit from the highest."""
    found = tl.zeros([1], tl.uint32)
    bit = tl.full([1], 0x80000000, tl.uint32)
    for _ in range(32):
        trial = found | bit
        enough = tl.sum((keys >= trial).to(tl.int32), 0) >= k
        found = tl.where(enough, trial, found)
        bit = bit >> 1
    return found


@triton.jit(do_not_specialize=["n_centres", "n_groups", "k"])
def _bounds(maxima, counts, n_centres, n_groups, k, BLOCK: tl.constexpr):
    """The k-th largest of each centre's maxima; and no candidate counted yet."""
    centre = tl.program_id(0)
    group = tl.arange(0, BLOCK)
    pointers = maxima + centre.to(tl.int64) * n_groups + group
    values = tl.load(pointers, mask=group < n_groups, other=-float("inf"))
    key = _kth_largest(_sortable(values), k)
    bits = tl.where(key >> 31 == 1, key ^ 0x80000000, ~key)
    one = tl.arange(0, 1)
    tl.store(counts + centre, 0)
    tl.store(counts + n_centres + centre, 0)
    tl.store(counts + 2 * n_centres + centre + one, bits.to(tl.int32, bitcast=True))


@triton.jit(do_not_specialize=["n_centres", "n_rows", "k"])
def _candidates(
    centres,
    rows,
    counts,
    candidates,
    n_centres,
    n_rows,
    k,
    D: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    CENTRES: tl.constexpr,
    ROOM: tl.constexpr,
):
    """List the rows above each centre's bound, and behind these up to k that equal it."""
    centre = tl.program_id(0) * CENTRES + tl.arange(0, CENTRES)
    step = tl.num_programs(1) * ROWS
    factor = load_rows(centres, centre, centre < n_centres, 0, D, STEP)
    inside = centre < n_centres
    bound = tl.load(counts + 2 * n_centres + centre, mask=inside, other=0)
    bound = bound.to(tl.float32, bitcast=True)
    products = candidates + n_centres.to(tl.int64) * ROOM
    place_in_tile = tl.arange(0, ROWS)
    for start in range(tl.program_id(1) * ROWS, n_rows, step):
        row = start + place_in_tile
        product = _products(factor, centres, centre, n_centres, rows, row, n_rows, D, STEP)
        listed = inside[:, None] & (row < n_rows)[None, :] & (product >= bound[:, None])
        # Few are listed in a tile: each round takes the last left for each centre.
        left = tl.where(listed, place_in_tile[None, :], -1)
        last = tl.max(left, 1)
        while tl.max(last, 0) >= 0:
            is_last = place_in_tile[None, :] == last[:, None]
            value = tl.max(tl.where(is_last, product, -float("inf")), 1)
            tied = value == bound
            counter = counts + centre + tl.where(tied, n_centres, 0)
            place = tl.atomic_add(counter, 1, mask=last >= 0, sem="relaxed")
            kept = (last >= 0) & (place < tl.where(tied, k, ROOM - k))
            place = centre.to(tl.int64) * ROOM + place + tl.where(tied, ROOM - k, 0)
            tl.store(candidates + place, start + last, mask=kept)
            tl.store(products + place, value.to(tl.int32, bitcast=True), mask=kept)
            left = tl.where(place_in_tile[None, :] < last[:, None], left, -1)
            last = tl.max(left, 1)


@triton.jit(do_not_specialize=["n_centres", "k"])
def _largest(counts, candidates, found, n_centres, k, ROOM: tl.constexpr):
    """The k candidates of largest product."""
    centre = tl.program_id(0)
    place = tl.arange(0, ROOM)
    above = tl.load(counts + centre)
    ties = tl.load(counts + n_centres + centre)
    valid = tl.where(place < ROOM - k, place < above, place - (ROOM - k) < ties)
    offset = centre.to(tl.int64) * ROOM + place
    products = candidates + n_centres.to(tl.int64) * ROOM
    bits = tl.load(products + offset, mask=valid, other=0)
    keys = tl.where(valid, _sortable(bits.to(tl.float32, bitcast=True)), 0)
    kth = _kth_largest(keys, k)
    larger = keys > kth
    equal = valid & (keys == kth)
    still = k - tl.sum(larger.to(tl.int32), 0)
    chosen = larger | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= still))
    target = found + centre.to(tl.int64) * k + tl.cumsum(chosen.to(tl.int32), 0) - 1
    row = tl.load(candidates + offset, mask=chosen, other=0)
    tl.store(target, row.to(tl.int64), mask=chosen)
