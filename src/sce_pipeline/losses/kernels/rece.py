"""RECE: logits of tokens and items that meet, round after round, and both gradients.

Within a round every token and every item occurs once, and rounds follow each other, a launch each.
So whatever is summed over rounds is read, added to and written back by one program at a time:
there are no atomics, and the same bits come out every time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sce_pipeline.losses.kernels.common import (
    LN_2,
    LOG2_E,
    TRITON_DTYPES,
    cdiv,
    dot,
    launch,
    padded,
    sigmoid,
    softplus,
)
from sce_pipeline.losses.kernels.rows import load_rows

if TYPE_CHECKING:
    from sce_pipeline.losses.rece import Meetings

NOWHERE = tl.constexpr(2**30)
"""The chunk of what is not there: far from every chunk."""

LOWEST = tl.constexpr(-1e30)
"""Below every logit, and finite, so that no difference of two is NaN."""

BLOCK = 16
"""Tokens that a program holds where there is no product of matrices."""


class Tile(NamedTuple):
    """How much a program holds at a time.

    Attributes:
        held: Rows it adds sums up for: tokens in the forward, items for the table's gradient.
        passing: Rows of the other kind in a block that passes by.
        warps: Its warps.
        registers: The most registers a thread may take; fewer let more programs run side by side.
    """

    held: int
    passing: int
    warps: int
    registers: int | None = None


HALF_TILES = {
    64: Tile(64, 32, 4, 168),
    128: Tile(64, 32, 4),
    256: Tile(64, 32, 8),
    512: Tile(32, 32, 8),
}
"""Tiles for factors of 16 bits, by the largest d they are for: those whose registers suffice."""

FLOAT32_TILES = {
    64: Tile(64, 32, 4, 168),
    128: Tile(32, 32, 8),
    256: Tile(16, 16, 8),
    512: Tile(16, 16, 8, 255),
}
"""Tiles for factors of float32, which are cut into two of TF32 in registers."""


def tile_for(d: int, dtype: torch.dtype) -> Tile:
    """Return the tile for rows of size ``d`` and factors of ``dtype``."""
    tiles = FLOAT32_TILES if dtype == torch.float32 else HALF_TILES
    return tiles[min(largest for largest in tiles if largest >= d)]


class Sums(NamedTuple):
    """What the forward leaves for the backward.

    Attributes:
        margins: logsumexp of the negatives' logits less the target's, float32 [tokens]; very low
            where there are no negatives.
        log2_partitions: log2 of the sum of exp(logit) over target and negatives, float32 [tokens].
        hidden_gradient: Gradient of each token's own loss, float32 [tokens, d].
    """

    margins: Tensor
    log2_partitions: Tensor
    hidden_gradient: Tensor


def token_sums(
    hidden: Tensor,
    item_embeddings: Tensor,
    targets: Tensor,
    meetings: Meetings,
    *,
    duplicate_correction: bool,
    dtype: torch.dtype,
    tile: Tile | None = None,
) -> Sums:
    """Return the margin of each token and the gradient of its hidden state.

    Args:
        hidden: [tokens, d], contiguous.
        item_embeddings: [n_items, d], contiguous.
        targets: int64 [tokens], contiguous; one out of range makes its token's sums NaN.
        meetings: Who meets whom.
        duplicate_correction: Whether a pair counts in the first round it meets in alone.
        dtype: What the factors of products are cast to.
        tile: Sizes other than those of ``tile_for``.
    """
    n_tokens, d = hidden.shape
    tile = tile or tile_for(d, dtype)
    references, totals = hidden.new_empty(2, n_tokens, dtype=torch.float32)
    gradient = hidden.new_empty(n_tokens, d, dtype=torch.float32)
    constants = _constants(d, dtype, tile)
    for round_ in range(len(meetings.token_order)):
        launch(
            _token_kernel,
            (cdiv(n_tokens, tile.held),),
            hidden,
            item_embeddings,
            targets,
            *meetings[:4],
            references,
            totals,
            gradient,
            *_sizes(hidden, item_embeddings, meetings, round_, duplicate_correction),
            BLOCK_TOKENS=tile.held,
            BLOCK_ITEMS=tile.passing,
            **constants,
        )
    launch(
        _finish_kernel,
        (cdiv(n_tokens, BLOCK),),
        hidden,
        item_embeddings,
        targets,
        references,
        totals,
        gradient,
        n_tokens,
        len(item_embeddings),
        **_row_constants(d, dtype),
    )
    return Sums(margins=totals, log2_partitions=references, hidden_gradient=gradient)


def table_gradient(
    hidden: Tensor,
    item_embeddings: Tensor,
    targets: Tensor,
    meetings: Meetings,
    sums: Sums,
    scale: Tensor,
    *,
    duplicate_correction: bool,
    dtype: torch.dtype,
    tile: Tile | None = None,
) -> Tensor:
    """Return the gradient of the table, [n_items, d] in its dtype, summed in float32.

    Args:
        hidden: [tokens, d], contiguous.
        item_embeddings: [n_items, d], contiguous.
        targets: int64 [tokens], contiguous.
        meetings: Who meets whom.
        sums: What the forward left.
        scale: The gradient of each token's own loss, float32, one number.
        duplicate_correction: As in the forward.
        dtype: As in the forward.
        tile: Sizes other than those of ``tile_for``.
    """
    n_tokens, d = hidden.shape
    n_items = len(item_embeddings)
    tile = tile or tile_for(d, dtype)
    gradient = torch.empty_like(item_embeddings, dtype=torch.float32)
    constants = _constants(d, dtype, tile)
    for round_ in range(len(meetings.token_order)):
        launch(
            _table_kernel,
            (cdiv(n_items, tile.held),),
            hidden,
            item_embeddings,
            targets,
            *meetings[:4],
            sums.log2_partitions,
            scale,
            gradient,
            *_sizes(hidden, item_embeddings, meetings, round_, duplicate_correction),
            BLOCK_TOKENS=tile.passing,
            BLOCK_ITEMS=tile.held,
            **constants,
        )
    by_target = targets.sort(stable=True)
    launch(
        _target_kernel,
        (n_tokens,),
        hidden,
        by_target.values,
        by_target.indices,
        sums.margins,
        scale,
        gradient,
        n_tokens,
        n_items,
        **_row_constants(d, dtype),
    )
    return gradient.to(item_embeddings.dtype)


def _sizes(
    hidden: Tensor,
    item_embeddings: Tensor,
    meetings: Meetings,
    round_: int,
    duplicate_correction: bool,
) -> tuple[int, ...]:
    """Return the numbers of a round, in the order that both kernels take them in."""
    return (
        len(hidden),
        len(item_embeddings),
        meetings.n_chunks,
        meetings.n_extra_chunks,
        len(meetings.token_order),
        round_,
        round_ if duplicate_correction else 0,
    )


def _constants(d: int, dtype: torch.dtype, tile: Tile) -> dict[str, object]:
    return {
        "D": d,
        "DTYPE": TRITON_DTYPES[dtype],
        # Probabilities are multiplied by 2^SHIFT before the cast: float16 has none below 2^-24.
        "SHIFT": 14.0 if dtype == torch.float16 else 0.0,
        "BLOCK_D": padded(d),
        "num_warps": tile.warps,
        "maxnreg": tile.registers,
    }


def _row_constants(d: int, dtype: torch.dtype) -> dict[str, object]:
    block_d = padded(d)
    return {
        "D": d,
        "DTYPE": TRITON_DTYPES[dtype],
        "BLOCK": BLOCK,
        "BLOCK_D": block_d,
        "num_warps": max(1, min(4, block_d // 64)),
    }


@triton.jit
def _window(first, last, n_from, n_to, n_chunks, n_extra):
    """Return the positions, from ``begin`` to before ``end``, that ``first`` to ``last`` may meet.

    Of n things cut into k chunks, position p lies in chunk ((p + 1)k - 1) // n.
    """
    n_chunks = n_chunks.to(tl.int64)
    first_chunk = ((first + 1) * n_chunks - 1) // n_from - n_extra
    last_chunk = ((last + 1) * n_chunks - 1) // n_from + n_extra
    begin = tl.maximum(first_chunk, 0) * n_to // n_chunks
    end = (tl.minimum(last_chunk, n_chunks - 1) + 1) * n_to // n_chunks
    return begin.to(tl.int32), end.to(tl.int32)


@triton.jit
def _meet_first(
    row_chunks,
    column_chunks,
    row_live,
    column_live,
    round_,
    n_earlier,
    n_extra,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Return which rows and columns meet in this round and in none of the earlier ones.

    ``row_chunks`` and ``column_chunks`` point to the chunk of round 0; the other rounds follow.
    a and b meet if a + n_extra - b lies in 0..2·n_extra: one comparison, of unsigned numbers.
    """
    nearest = tl.full([ROWS, COLUMNS], 0xFFFFFFFF, tl.uint32)
    for earlier in range(n_earlier):
        row = tl.load(row_chunks + earlier, mask=row_live, other=0).to(tl.int32) + n_extra
        column = tl.load(column_chunks + earlier, mask=column_live, other=0).to(tl.int32)
        distance = (row[:, None] - column[None, :]).to(tl.uint32, bitcast=True)
        nearest = tl.minimum(nearest, distance)
    row = tl.load(row_chunks + round_, mask=row_live, other=0).to(tl.int32) + n_extra
    row = tl.where(row_live, row, -NOWHERE)
    column = tl.load(column_chunks + round_, mask=column_live, other=0).to(tl.int32)
    column = tl.where(column_live, column, NOWHERE)
    here = (row[:, None] - column[None, :]).to(tl.uint32, bitcast=True)
    return (here <= 2 * n_extra) & (nearest > 2 * n_extra)


SIZES = ["n_tokens", "n_items", "n_chunks", "n_extra", "n_rounds", "round_", "n_earlier"]


@triton.jit(do_not_specialize=SIZES)
def _token_kernel(
    hidden,
    table,
    targets,
    token_order,
    item_order,
    token_chunks,
    item_chunks,
    references,
    totals,
    gradient,
    n_tokens,
    n_items,
    n_chunks,
    n_extra,
    n_rounds,
    round_,
    n_earlier,
    D: tl.constexpr,
    DTYPE: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ITEMS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program holds some tokens, in the order of the round, and goes over the items they meet.

    Sums over negatives are relative to 2^reference, which grows with the largest logit.
    """
    first = tl.program_id(0) * BLOCK_TOKENS
    position = first + tl.arange(0, BLOCK_TOKENS)
    element = tl.arange(0, BLOCK_D)
    lane = tl.arange(0, BLOCK_ITEMS)
    live = position < n_tokens
    token_order += round_.to(tl.int64) * n_tokens
    token = tl.load(token_order + position, mask=live, other=0).to(tl.int64)
    place = token[:, None] * D + element[None, :]
    inside = live[:, None] & (element < D)[None, :]
    x = load_rows(hidden, token, live, 0, D, BLOCK_D).to(DTYPE)
    target = tl.load(targets + token, mask=live, other=-1)
    begun = position < tl.where(round_ > 0, n_tokens, 0)
    reference = tl.load(references + token, mask=begun, other=LOWEST)
    total = tl.load(totals + token, mask=begun, other=0.0)
    mean = tl.load(gradient + place, mask=begun[:, None] & (element < D)[None, :], other=0.0)

    last = tl.minimum(first + BLOCK_TOKENS, n_tokens) - 1
    begin, end = _window(first, last, n_tokens, n_items, n_chunks, n_extra)
    item_order += round_.to(tl.int64) * n_items
    for start in range(begin, end, BLOCK_ITEMS):
        item_live = start + lane < end
        item = tl.load(item_order + start + lane, mask=item_live, other=0)
        w = load_rows(table, item, item_live, 0, D, BLOCK_D).to(DTYPE)
        negative = _meet_first(
            token_chunks + token * n_rounds,
            item_chunks + item.to(tl.int64) * n_rounds,
            live,
            item_live,
            round_,
            n_earlier,
            n_extra,
            BLOCK_TOKENS,
            BLOCK_ITEMS,
        ) & (item[None, :] != target.to(tl.int32)[:, None])
        logits = dot(x, tl.trans(w), tl.zeros([BLOCK_TOKENS, BLOCK_ITEMS], tl.float32)) * LOG2_E
        logits = tl.where(negative, logits, float("-inf"))
        higher = tl.maximum(reference, tl.max(logits, 1) - SHIFT)
        weights = tl.exp2(logits - higher[:, None])
        rescale = tl.exp2(reference - higher)
        total = total * rescale + tl.sum(weights, 1)
        mean = dot(weights.to(DTYPE), w, mean * rescale[:, None])
        reference = higher

    # Read once more, the order keeps no register busy while the items pass by; nor does `place`.
    token = tl.load(token_order + position, mask=live, other=-1).to(tl.int64)
    place = token[:, None] * D + element[None, :]
    tl.store(gradient + place, mean, mask=inside)
    tl.store(references + token, reference, mask=live)
    tl.store(totals + token, total, mask=live)


@triton.jit(do_not_specialize=["n_tokens", "n_items"])
def _finish_kernel(
    hidden,
    table,
    targets,
    references,
    totals,
    gradient,
    n_tokens,
    n_items,
    D: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program finishes some tokens, in the place of what their sums were: see ``Sums``."""
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    element = tl.arange(0, BLOCK_D)
    live = token < n_tokens
    place = token[:, None] * D + element[None, :]
    inside = live[:, None] & (element < D)[None, :]
    x = load_rows(hidden, token, live, 0, D, BLOCK_D).to(DTYPE).to(tl.float32)
    target = tl.load(targets + token, mask=live, other=0)
    known = (target >= 0) & (target < n_items)
    w = load_rows(table, target, known, 0, D, BLOCK_D).to(DTYPE).to(tl.float32)
    reference = tl.load(references + token, mask=live, other=0.0)
    total = tl.load(totals + token, mask=live, other=0.0)
    sums = tl.load(gradient + place, mask=inside, other=0.0)

    total = tl.where(total == 0, 1.0, total)  # without negatives the reference is the lowest
    positive = tl.where(known, tl.sum(x * w, 1), float("nan"))
    margin = reference * LN_2 + tl.log(total) - positive
    missed = sigmoid(margin)  # 1 - p of the target, without cancellation
    mean = sums / total[:, None]
    tl.store(totals + token, margin, mask=live)
    tl.store(references + token, (positive + softplus(margin)) * LOG2_E, mask=live)
    tl.store(gradient + place, missed[:, None] * (mean - w), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def _table_kernel(
    hidden,
    table,
    targets,
    token_order,
    item_order,
    token_chunks,
    item_chunks,
    log2_partitions,
    scale,
    gradient,
    n_tokens,
    n_items,
    n_chunks,
    n_extra,
    n_rounds,
    round_,
    n_earlier,
    D: tl.constexpr,
    DTYPE: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ITEMS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program holds some items, in the order of the round, and goes over the tokens they meet.

    It adds what the items get as negatives.
    """
    first = tl.program_id(0) * BLOCK_ITEMS
    position = first + tl.arange(0, BLOCK_ITEMS)
    element = tl.arange(0, BLOCK_D)
    lane = tl.arange(0, BLOCK_TOKENS)
    live = position < n_items
    item_order += round_.to(tl.int64) * n_items
    item = tl.load(item_order + position, mask=live, other=0)
    w = load_rows(table, item, live, 0, D, BLOCK_D).to(DTYPE)
    sums = tl.zeros([BLOCK_ITEMS, BLOCK_D], tl.float32)

    last = tl.minimum(first + BLOCK_ITEMS, n_items) - 1
    begin, end = _window(first, last, n_items, n_tokens, n_chunks, n_extra)
    token_order += round_.to(tl.int64) * n_tokens
    for start in range(begin, end, BLOCK_TOKENS):
        token_live = start + lane < end
        token = tl.load(token_order + start + lane, mask=token_live, other=0).to(tl.int64)
        x = load_rows(hidden, token, token_live, 0, D, BLOCK_D).to(DTYPE)
        target = tl.load(targets + token, mask=token_live, other=-1).to(tl.int32)
        log2_partition = tl.load(log2_partitions + token, mask=token_live, other=0.0)
        negative = _meet_first(
            item_chunks + item.to(tl.int64) * n_rounds,
            token_chunks + token * n_rounds,
            live,
            token_live,
            round_,
            n_earlier,
            n_extra,
            BLOCK_ITEMS,
            BLOCK_TOKENS,
        ) & (item[:, None] != target[None, :])
        logits = dot(w, tl.trans(x), tl.zeros([BLOCK_ITEMS, BLOCK_TOKENS], tl.float32)) * LOG2_E
        weights = tl.exp2(logits - (log2_partition - SHIFT)[None, :])
        sums = dot(tl.where(negative, weights, 0.0).to(DTYPE), x, sums)

    # Read once more, as in _token_kernel.
    item = tl.load(item_order + position, mask=live, other=-1)
    place = item.to(tl.int64)[:, None] * D + element[None, :]
    inside = live[:, None] & (element < D)[None, :]
    begun = position < tl.where(round_ > 0, n_items, 0)
    before = tl.load(gradient + place, mask=begun[:, None] & (element < D)[None, :], other=0.0)
    tl.store(gradient + place, before + sums * (tl.load(scale) * 2.0**-SHIFT), mask=inside)


@triton.jit(do_not_specialize=["n_tokens", "n_items"])
def _target_kernel(
    hidden,
    sorted_targets,
    tokens,
    margins,
    scale,
    gradient,
    n_tokens,
    n_items,
    D: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The program at the first token of each target adds what the item gets as a target."""
    first = tl.program_id(0)
    item = tl.load(sorted_targets + first)
    previous = tl.load(sorted_targets + first - 1, mask=first > 0, other=-1)
    if (item != previous) & (item >= 0) & (item < n_items):
        lane = tl.arange(0, BLOCK)
        element = tl.arange(0, BLOCK_D)
        sums = tl.zeros([BLOCK_D], tl.float32)
        start = first
        found = BLOCK
        while found == BLOCK:
            live = start + lane < n_tokens
            live &= tl.load(sorted_targets + start + lane, mask=live, other=-1) == item
            token = tl.load(tokens + start + lane, mask=live, other=0)
            x = load_rows(hidden, token, live, 0, D, BLOCK_D).to(DTYPE)
            margin = tl.load(margins + token, mask=live, other=0.0)
            sums += tl.sum(sigmoid(margin)[:, None] * x.to(tl.float32), 0)
            found = tl.sum(live.to(tl.int32), 0)
            start += BLOCK
        place = gradient + item * D + element
        before = tl.load(place, mask=element < D, other=0.0)
        tl.store(place, before - sums * tl.load(scale), mask=element < D)
