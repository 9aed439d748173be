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
    # Each of two searches has its own room in shared memory for the tiles on their way.
    stages = max(1, min(3, 3 * 2**15 // row_bytes))
    return Tile(64, 64, step, num_warps=8, num_stages=stages)


class Rows(NamedTuple):
    """Rows to find the nearest of.

    Attributes:
        matrix: [n_rows, d], floating; cast to the dtype of the centres as it is read.
        k: Rows to find for each centre, at most ``n_rows``.
    """

    matrix: Tensor
    k: int


def nearest_rows(centres: Tensor, *searches: Rows) -> list[Tensor]:
    """Return the ``k`` rows of largest inner product with each centre, in any order.

    They are always ``k`` distinct rows; which ones is open among rows that tie. NaN counts as less
    than all else, or, where there are few rows, as more.

    Args:
        centres: [n_centres, d], in the dtype the products take their factors in.
        searches: One or two matrices.

    Returns:
        Numbers of rows for each search, int64 [n_centres, k].
    """
    large = [rows for rows in searches if _is_large(rows)]
    found = iter(filtered_rows(centres, *large) if large else [])
    return [next(found) if _is_large(rows) else _ranked_rows(centres, rows) for rows in searches]


def _is_large(rows: Rows) -> bool:
    return len(rows.matrix) > FEW_ROWS and rows.k <= MANY_NEAREST


def _ranked_rows(centres: Tensor, rows: Rows) -> Tensor:
    """Find the nearest rows by their products, few centres at a time."""
    factor = rows.matrix.to(centres.dtype).T
    found = [
        (centres[chunk] @ factor).topk(rows.k, sorted=False).indices
        for chunk in chunks(len(centres), len(rows.matrix), centres.device)
    ]
    return torch.cat(found)


class _Plan(NamedTuple):
    """How one of the searches is cut up.

    Attributes:
        strides: Programs along the rows in the first pass; a group is every so many-th row.
        groups: Groups, whose maxima are kept.
        programs: Programs along the rows in the second pass.
        room: Candidates a centre has room for.
    """

    strides: int
    groups: int
    programs: int
    room: int


def _plan(n_centres: int, rows: Rows, tile: Tile) -> _Plan:
    centre_tiles, row_tiles = cdiv(n_centres, tile.centres), cdiv(len(rows.matrix), tile.rows)
    strides = max(cdiv(GROUPS_PER_NEAREST * rows.k, tile.rows), cdiv(PROGRAMS, centre_tiles))
    strides = min(strides, row_tiles)
    programs = min(row_tiles, max(1, 4 * PROGRAMS // centre_tiles))
    return _Plan(strides, strides * tile.rows, programs, power_of_2(3 * rows.k))


def filtered_rows(centres: Tensor, *searches: Rows, tile: Tile | None = None) -> list[Tensor]:
    """Return what ``nearest_rows`` does, through the kernels whatever the sizes.

    A centre has room for at least 2 k candidates above its bound. If more came, which takes rows
    whose order conspires with that of the groups, it would choose among those that came first.

    Both searches go in the same launches: each of those takes the host as long as it runs.

    Args:
        centres: [n_centres, d].
        searches: One or two matrices.
        tile: ``tile_of`` the sizes, if not given.
    """
    n_centres, d = centres.shape
    device = centres.device
    centres = centres.contiguous()
    searches = tuple(Rows(rows.matrix.contiguous(), rows.k) for rows in searches)
    first, last = searches[0], searches[-1]
    if tile is None:
        tile = min((tile_of(d, centres.dtype, rows.matrix.dtype) for rows in searches), key=_stages)
    plans = [_plan(n_centres, rows, tile) for rows in searches]
    one, other = plans[0], plans[-1]
    n_searches, centre_tiles = len(searches), cdiv(n_centres, tile.centres)
    matrices = (first.matrix, last.matrix)
    sizes = (n_centres, len(first.matrix), len(last.matrix))
    constants = {
        "D": d,
        "STEP": tile.step,
        "ROWS": tile.rows,
        "CENTRES": tile.centres,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }

    maxima = torch.empty(
        n_centres * sum(plan.groups for plan in plans), dtype=torch.float32, device=device
    )
    launch(
        _group_maxima,
        (centre_tiles, sum(plan.strides for plan in plans)),
        centres,
        *matrices,
        maxima,
        *sizes,
        one.strides,
        **constants,
    )
    # For each centre: candidates above its bound, those at it, and the bits of the bound.
    counts = torch.empty(n_searches, 3, n_centres, dtype=torch.int32, device=device)
    launch(
        _bounds,
        (n_centres, n_searches),
        maxima,
        counts,
        n_centres,
        one.groups,
        other.groups,
        first.k,
        last.k,
        BLOCK_ONE=power_of_2(one.groups),
        BLOCK_OTHER=power_of_2(other.groups),
        num_warps=8,
    )
    del maxima
    # The candidates, and the bits of their products.
    candidates = torch.empty(
        2 * n_centres * sum(plan.room for plan in plans), dtype=torch.int32, device=device
    )
    launch(
        _candidates,
        (centre_tiles, sum(plan.programs for plan in plans)),
        centres,
        *matrices,
        counts,
        candidates,
        *sizes,
        first.k,
        last.k,
        one.programs,
        ROOM_ONE=one.room,
        ROOM_OTHER=other.room,
        **constants,
    )
    found = [torch.empty(n_centres, rows.k, dtype=torch.int64, device=device) for rows in searches]
    launch(
        _largest,
        (n_centres, n_searches),
        counts,
        candidates,
        found[0],
        found[-1],
        n_centres,
        first.k,
        last.k,
        ROOM_ONE=one.room,
        ROOM_OTHER=other.room,
        num_warps=max(4, min(16, max(one.room, other.room) // 1024)),
    )
    return found


def _stages(tile: Tile) -> int:
    return tile.num_stages


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


@triton.jit(do_not_specialize=["n_centres", "n_one", "n_other", "strides"])
def _group_maxima(
    centres,
    one,
    other,
    maxima,
    n_centres,
    n_one,
    n_other,
    strides,
    D: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    CENTRES: tl.constexpr,
):
    """The largest product of each centre in each group, of the first matrix and of the second."""
    place = tl.program_id(1)
    if place < strides:
        _keep_maxima(centres, one, maxima, n_centres, n_one, place, strides, D, STEP, ROWS, CENTRES)
    else:
        maxima += n_centres.to(tl.int64) * strides * ROWS
        rest = tl.num_programs(1) - strides
        place -= strides
        _keep_maxima(
            centres, other, maxima, n_centres, n_other, place, rest, D, STEP, ROWS, CENTRES
        )


@triton.jit
def _keep_maxima(
    centres,
    rows,
    maxima,
    n_centres,
    n_rows,
    place,
    strides,
    D: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    CENTRES: tl.constexpr,
):
    """Store the maxima of the groups at a place; a group is every so many-th row."""
    centre = tl.program_id(0) * CENTRES + tl.arange(0, CENTRES)
    group = place * ROWS + tl.arange(0, ROWS)
    step = strides * ROWS
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


@triton.jit(do_not_specialize=["n_centres", "n_one", "n_other", "k_one", "k_other"])
def _bounds(
    maxima,
    counts,
    n_centres,
    n_one,
    n_other,
    k_one,
    k_other,
    BLOCK_ONE: tl.constexpr,
    BLOCK_OTHER: tl.constexpr,
):
    """The k-th largest of each centre's maxima; and no candidate counted yet."""
    centre = tl.program_id(0)
    if tl.program_id(1) == 0:
        _keep_bound(maxima, counts, centre, n_centres, n_one, k_one, BLOCK_ONE)
    else:
        maxima += n_centres.to(tl.int64) * n_one
        counts += 3 * n_centres
        _keep_bound(maxima, counts, centre, n_centres, n_other, k_other, BLOCK_OTHER)


@triton.jit
def _keep_bound(maxima, counts, centre, n_centres, n_groups, k, BLOCK: tl.constexpr):
    group = tl.arange(0, BLOCK)
    pointers = maxima + centre.to(tl.int64) * n_groups + group
    values = tl.load(pointers, mask=group < n_groups, other=-float("inf"))
    key = _kth_largest(_sortable(values), k)
    bits = tl.where(key >> 31 == 1, key ^ 0x80000000, ~key)
    one = tl.arange(0, 1)
    tl.store(counts + centre, 0)
    tl.store(counts + n_centres + centre, 0)
    tl.store(counts + 2 * n_centres + centre + one, bits.to(tl.int32, bitcast=True))


@triton.jit(do_not_specialize=["n_centres", "n_one", "n_other", "k_one", "k_other", "programs"])
def _candidates(
    centres,
    one,
    other,
    counts,
    candidates,
    n_centres,
    n_one,
    n_other,
    k_one,
    k_other,
    programs,
    ROOM_ONE: tl.constexpr,
    ROOM_OTHER: tl.constexpr,
    D: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    CENTRES: tl.constexpr,
):
    """List the rows above each centre's bound, and behind these up to k that equal it."""
    place = tl.program_id(1)
    if place < programs:
        _list_candidates(
            centres,
            one,
            counts,
            candidates,
            n_centres,
            n_one,
            k_one,
            place,
            programs,
            ROOM_ONE,
            D,
            STEP,
            ROWS,
            CENTRES,
        )
    else:
        _list_candidates(
            centres,
            other,
            counts + 3 * n_centres,
            candidates + 2 * n_centres.to(tl.int64) * ROOM_ONE,
            n_centres,
            n_other,
            k_other,
            place - programs,
            tl.num_programs(1) - programs,
            ROOM_OTHER,
            D,
            STEP,
            ROWS,
            CENTRES,
        )


@triton.jit
def _list_candidates(
    centres,
    rows,
    counts,
    candidates,
    n_centres,
    n_rows,
    k,
    place,
    programs,
    ROOM: tl.constexpr,
    D: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    CENTRES: tl.constexpr,
):
    """List what ``place`` finds, of the ``programs`` that go over the rows."""
    centre = tl.program_id(0) * CENTRES + tl.arange(0, CENTRES)
    step = programs * ROWS
    factor = load_rows(centres, centre, centre < n_centres, 0, D, STEP)
    inside = centre < n_centres
    bound = tl.load(counts + 2 * n_centres + centre, mask=inside, other=0)
    bound = bound.to(tl.float32, bitcast=True)
    products = candidates + n_centres.to(tl.int64) * ROOM
    place_in_tile = tl.arange(0, ROWS)
    for start in range(place * ROWS, n_rows, step):
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
            number = tl.atomic_add(counter, 1, mask=last >= 0, sem="relaxed")
            kept = (last >= 0) & (number < tl.where(tied, k, ROOM - k))
            number = centre.to(tl.int64) * ROOM + number + tl.where(tied, ROOM - k, 0)
            tl.store(candidates + number, start + last, mask=kept)
            tl.store(products + number, value.to(tl.int32, bitcast=True), mask=kept)
            left = tl.where(place_in_tile[None, :] < last[:, None], left, -1)
            last = tl.max(left, 1)


@triton.jit(do_not_specialize=["n_centres", "k_one", "k_other"])
def _largest(
    counts,
    candidates,
    found_one,
    found_other,
    n_centres,
    k_one,
    k_other,
    ROOM_ONE: tl.constexpr,
    ROOM_OTHER: tl.constexpr,
):
    """The k candidates of largest product."""
    centre = tl.program_id(0)
    if tl.program_id(1) == 0:
        _keep_largest(counts, candidates, found_one, centre, n_centres, k_one, ROOM_ONE)
    else:
        counts += 3 * n_centres
        candidates += 2 * n_centres.to(tl.int64) * ROOM_ONE
        _keep_largest(counts, candidates, found_other, centre, n_centres, k_other, ROOM_OTHER)


@triton.jit
def _keep_largest(counts, candidates, found, centre, n_centres, k, ROOM: tl.constexpr):
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
