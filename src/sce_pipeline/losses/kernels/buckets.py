"""Cross-entropies within the buckets of SCE, and their gradients, without a tensor of logits.

Logits live in registers, a tile at a time, and are made anew in the backward. There only one of the
buckets that hold a token matters, that of its largest loss: the token is then a *winner* there. A
bucket's winners are listed next to each other, so that the backward visits nothing else.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sce_pipeline.losses.kernels.common import (
    LOG2_E,
    TRITON_DTYPES,
    cdiv,
    dot,
    launch,
    log1p,
    padded,
)
from sce_pipeline.losses.kernels.rows import cast, load_rows, row_products

UNCOVERED = -(2**63)
"""The key of a token in no bucket: the only one below 0."""

BLOCK = 1024
"""Slots of a bucket, or buckets, looked at at a time."""

CLEARED = tl.constexpr(2048)
"""Numbers set to 0 at a time."""

CLEANERS = 1024
"""Programs that set to 0 what no other writes, where there is enough of it."""

TARGETS_BLOCK = tl.constexpr(16)
"""Targets whose gradient is added at a time."""

P_SCALE = tl.constexpr(2.0**14)
"""Probabilities are so much larger while they are float16, of which small ones would be 0."""


class Tile(NamedTuple):
    """How much a program works on.

    Attributes:
        own: Tokens, or in the table's gradient items, that the program is about.
        other: Of the others, how many it meets at a time.
        step: Columns it multiplies at a time.
        width: Columns of the gradient that it sums.
        num_warps: Its warps.
        num_stages: Blocks of the others on their way at a time.
    """

    own: int
    other: int
    step: int
    width: int
    num_warps: int
    num_stages: int


def tile_of(d: int, dtype: torch.dtype) -> Tile:
    """Return a tile that stays in registers and shared memory, for factors of ``dtype``."""
    block_d = padded(d)
    if dtype == torch.float32:
        if block_d <= 64:
            return Tile(64, 32, step=block_d, width=block_d, num_warps=4, num_stages=2)
        return Tile(64, 32, step=32, width=64, num_warps=8, num_stages=2)
    num_warps = 4 if block_d <= 64 else 8
    step, width = min(block_d, 128), min(block_d, 256)
    return Tile(64, 64, step, width, num_warps, num_stages=2)


class Winners(NamedTuple):
    """What the forward leaves for the backward.

    Attributes:
        keys: int64 [tokens]; the bits of the token's largest loss above the number of the slot
            where it has it, ``UNCOVERED`` for a token in no bucket.
        positives: The logit of each token's target, float32 [tokens]; junk if in no bucket.
        tokens: int32 [n_buckets, bucket_size_x]; the tokens that have their largest loss in the
            bucket, then junk.
        counts: int32 [n_buckets]; how many these are.
        covered: int32 [1]; how many there are in all.
    """

    keys: Tensor
    positives: Tensor
    tokens: Tensor
    counts: Tensor
    covered: Tensor


def find_winners(
    hidden: Tensor,
    item_embeddings: Tensor,
    targets: Tensor,
    bucket_tokens: Tensor,
    bucket_items: Tensor,
    dtype: torch.dtype,
    *,
    tile: Tile | None = None,
) -> tuple[Tensor, Winners]:
    """Return the mean of each covered token's largest loss, and in which bucket it has it.

    All tensors are contiguous. Losses that tie exactly go to the bucket of the larger number. A
    target that is no item makes its loss NaN, and NaN is larger than any other loss.

    Args:
        hidden: [tokens, d].
        item_embeddings: [n_items, d].
        targets: int64 [tokens].
        bucket_tokens: int64 [n_buckets, bucket_size_x].
        bucket_items: int64 [n_buckets, bucket_size_y].
        dtype: What the factors of matrix products are cast to.
        tile: ``tile_of`` the sizes, if not given.
    """
    n_tokens, d = hidden.shape
    n_buckets, size_x = bucket_tokens.shape
    device = hidden.device
    tile = tile or tile_of(d, dtype)
    keys = torch.full((n_tokens,), UNCOVERED, device=device)
    positives = torch.empty(n_tokens, dtype=torch.float32, device=device)
    launch(
        _losses,
        (cdiv(size_x, tile.own), n_buckets),
        hidden,
        item_embeddings,
        targets,
        bucket_tokens,
        bucket_items,
        keys,
        positives,
        len(item_embeddings),
        size_x,
        bucket_items.shape[1],
        D=d,
        BLOCK_D=padded(d),
        STEP=tile.step,
        TOKENS=tile.own,
        ITEMS=tile.other,
        DTYPE=TRITON_DTYPES[dtype],
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    tokens = torch.empty(n_buckets, size_x, dtype=torch.int32, device=device)
    counts = torch.empty(n_buckets, dtype=torch.int32, device=device)
    losses = torch.empty(n_buckets, dtype=torch.float32, device=device)
    covered = torch.empty(1, dtype=torch.int32, device=device)
    mean = torch.empty((), dtype=torch.float32, device=device)
    launch(
        _winners,
        (n_buckets,),
        bucket_tokens,
        keys,
        tokens,
        counts,
        losses,
        size_x,
        BLOCK=BLOCK,
    )
    launch(_mean, (1,), losses, counts, mean, covered, n_buckets, BLOCK=BLOCK)
    return mean, Winners(keys, positives, tokens, counts, covered)


def gradients(
    hidden: Tensor,
    item_embeddings: Tensor,
    targets: Tensor,
    bucket_items: Tensor,
    winners: Winners,
    grad: Tensor,
    dtype: torch.dtype,
    *,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the hidden states and of the table, in the dtype of each.

    The table's is summed in float32, with atomics, so in any order. A table of another dtype has
    its columns summed in two halves: then the sums take no more room than its gradient.

    Args:
        hidden: [tokens, d].
        item_embeddings: [n_items, d].
        targets: int64 [tokens].
        bucket_items: int64 [n_buckets, bucket_size_y].
        winners: What ``find_winners`` returned.
        grad: Gradient of the mean of the winners' losses, float32 scalar.
        dtype: As in ``find_winners``.
        tile: As in ``find_winners``.
    """
    (n_tokens, d), n_items = hidden.shape, len(item_embeddings)
    n_buckets, size_y = bucket_items.shape
    size_x = winners.tokens.shape[1]
    tile = tile or tile_of(d, dtype)
    inputs = (hidden, item_embeddings, targets, bucket_items, *winners, grad)
    sizes = (n_items, size_x, size_y)
    options = {
        "D": d,
        "STEP": tile.step,
        "OWN": tile.own,
        "OTHER": tile.other,
        "DTYPE": TRITON_DTYPES[dtype],
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
    grad_hidden = torch.empty_like(hidden)
    rests = torch.empty_like(winners.positives)
    summed = d if item_embeddings.dtype == torch.float32 else 2 * cdiv(d, 4)
    sums = torch.empty(n_items, summed, dtype=torch.float32, device=hidden.device)
    cleaners = cdiv(min(CLEANERS, cdiv(n_items * summed, CLEARED.value)), n_buckets)
    launch(
        _hidden_gradient,
        (cdiv(size_x, tile.own) + cleaners, n_buckets, cdiv(d, tile.width)),
        *inputs,
        grad_hidden,
        rests,
        sums,
        n_tokens,
        *sizes,
        n_items * summed,
        WIDTH=tile.width,
        **options,
    )

    # With a narrower tile beside rows of an odd number of columns, which are not fetched ahead,
    # ptxas 12.8 reads a register that nothing wrote.
    width = min(padded(d if d % 2 else summed), tile.width)
    grid = (cdiv(size_y, tile.own) + 1, n_buckets, cdiv(summed, width))
    grad_table = sums if summed == d else torch.empty_like(item_embeddings)
    for first in range(0, d, summed):
        columns = {"FIRST": first, "SUMMED": summed}
        launch(
            _table_gradient, grid, *inputs, rests, sums, *sizes, WIDTH=width, **columns, **options
        )
        if grad_table is not sums:
            rows = max(1, CLEARED.value // padded(summed))
            launch(
                _round_sums,
                (cdiv(n_items, rows),),
                sums,
                grad_table,
                n_items,
                D=d,
                ROWS=rows,
                WIDTH=padded(summed),
                **columns,
            )
    return grad_hidden, grad_table


@triton.jit(do_not_specialize=["n_items", "size_x", "size_y"])
def _losses(
    hidden,
    item_embeddings,
    targets,
    bucket_tokens,
    bucket_items,
    keys,
    positives,
    n_items,
    size_x,
    size_y,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEP: tl.constexpr,
    TOKENS: tl.constexpr,
    ITEMS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Enter the losses of some tokens of a bucket among their keys, each under its slot."""
    bucket = tl.program_id(1).to(tl.int64)
    slot = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    valid = slot < size_x
    token = tl.load(bucket_tokens + bucket * size_x + slot, mask=valid, other=0)
    target = tl.load(targets + token, mask=valid, other=0)
    known = (target >= 0) & (target < n_items)
    x = load_rows(hidden, token, valid, 0, D, BLOCK_D)
    embedding = load_rows(item_embeddings, target, valid & known, 0, D, BLOCK_D)
    positive = tl.sum(x.to(tl.float32) * embedding.to(tl.float32), 1)
    positive = tl.where(known, positive, float("nan"))
    tl.store(positives + token, positive, mask=valid)

    # Logits are taken relative to the target's, so that a small loss is as precise as a large one.
    factor = cast(x, DTYPE)
    largest = tl.zeros([TOKENS], tl.float32)
    total = tl.zeros([TOKENS], tl.float32)
    for start in range(0, size_y, ITEMS):
        place = start + tl.arange(0, ITEMS)
        listed = place < size_y
        item = tl.load(bucket_items + bucket * size_y + place, mask=listed, other=0)
        logits = row_products(
            factor, hidden, token, valid, item_embeddings, item, listed, D, STEP, DTYPE
        )
        logits -= positive[:, None]
        negative = listed[None, :] & (item[None, :] != target[:, None])
        logits = tl.where(negative, logits, -float("inf"))
        larger = tl.maximum(largest, tl.max(logits, 1))
        terms = tl.exp2((logits - larger[:, None]) * LOG2_E)
        total = total * tl.exp2((largest - larger) * LOG2_E) + tl.sum(terms, 1)
        largest = larger
    above = largest + tl.log(tl.exp2(-largest * LOG2_E) + total)
    loss = tl.where(largest > 0, above, log1p(total))

    # Losses are at least 0, so their bits compare as they do, if NaN has but one sign.
    bits = tl.where(loss == loss, loss.to(tl.int32, bitcast=True), 0x7FC00000)
    key = (bits.to(tl.int64) << 32) | (bucket * size_x + slot)
    tl.atomic_max(keys + token, key, mask=valid, sem="relaxed")


@triton.jit(do_not_specialize=["size_x"])
def _winners(bucket_tokens, keys, winners, counts, losses, size_x, BLOCK: tl.constexpr):
    """List the winners of a bucket, and sum their losses."""
    bucket = tl.program_id(0).to(tl.int64)
    count = 0
    total = 0.0
    for start in range(0, size_x, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        valid = slot < size_x
        token = tl.load(bucket_tokens + bucket * size_x + slot, mask=valid, other=0)
        key = tl.load(keys + token, mask=valid, other=0)
        won = valid & (key.to(tl.int32) == (bucket * size_x + slot).to(tl.int32))
        place = count + tl.cumsum(won.to(tl.int32), 0) - 1
        tl.store(winners + bucket * size_x + place, token.to(tl.int32), mask=won)
        count += tl.sum(won.to(tl.int32), 0)
        total += tl.sum(tl.where(won, _loss(key), 0.0), 0)
    tl.store(counts + bucket, count)
    tl.store(losses + bucket, total)


@triton.jit(do_not_specialize=["n_buckets"])
def _mean(losses, counts, mean, covered, n_buckets, BLOCK: tl.constexpr):
    """Take the mean of the losses of all winners, and count them."""
    total = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.int32)
    for start in range(0, n_buckets, BLOCK):
        bucket = start + tl.arange(0, BLOCK)
        total += tl.load(losses + bucket, mask=bucket < n_buckets, other=0.0)
        count += tl.load(counts + bucket, mask=bucket < n_buckets, other=0)
    n_winners = tl.sum(count, 0)
    tl.store(mean, tl.sum(total, 0) / n_winners.to(tl.float32))
    tl.store(covered, n_winners)


@triton.jit
def _loss(key):
    return (key >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["n_tokens", "n_items", "size_x", "size_y", "n_sums"])
def _hidden_gradient(
    hidden,
    item_embeddings,
    targets,
    bucket_items,
    keys,
    positives,
    winners,
    counts,
    covered,
    grad,
    grad_hidden,
    rests,
    sums,
    n_tokens,
    n_items,
    size_x,
    size_y,
    n_sums,
    D: tl.constexpr,
    STEP: tl.constexpr,
    WIDTH: tl.constexpr,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Σ p w over the bucket's items less (1 - p of the target) w of the target.

    The latter factor, the sum of the other probabilities, goes to ``rests``. The last programs of
    a bucket clear what nobody writes: the rows of uncovered tokens, and what is summed later.
    """
    bucket = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * OWN
    first_column = tl.program_id(2) * WIDTH
    if first >= size_x:
        n_blocks = tl.cdiv(size_x, OWN)
        cleaner = (tl.program_id(0) - n_blocks) * tl.num_programs(1) + tl.program_id(1)
        n_cleaners = (tl.num_programs(0) - n_blocks) * tl.num_programs(1)
        column = first_column + tl.arange(0, WIDTH)
        for start in range(cleaner * OWN, n_tokens, n_cleaners * OWN):
            token = start + tl.arange(0, OWN)
            uncovered = tl.load(keys + token, mask=token < n_tokens, other=0) < 0
            pointers = grad_hidden + token.to(tl.int64)[:, None] * D + column[None, :]
            nothing = tl.zeros([OWN, WIDTH], grad_hidden.dtype.element_ty)
            tl.store(pointers, nothing, mask=uncovered[:, None] & (column < D)[None, :])
        cleaner += tl.program_id(2) * n_cleaners
        step = n_cleaners.to(tl.int64) * tl.num_programs(2) * CLEARED
        for start in range(cleaner.to(tl.int64) * CLEARED, n_sums, step):
            place = start + tl.arange(0, CLEARED)
            tl.store(sums + place, tl.zeros([CLEARED], tl.float32), mask=place < n_sums)
        return
    count = tl.load(counts + bucket)
    if first >= count:
        return
    scale: tl.constexpr = P_SCALE if DTYPE == tl.float16 else 1.0
    place = first + tl.arange(0, OWN)
    valid = place < count
    token = tl.load(winners + bucket * size_x + place, mask=valid, other=0)
    target = tl.load(targets + token, mask=valid, other=0)
    positive = tl.load(positives + token, mask=valid, other=0.0)
    loss = _loss(tl.load(keys + token, mask=valid, other=0))
    factor = cast(load_rows(hidden, token, valid, 0, D, STEP), DTYPE)
    total = tl.zeros([OWN], tl.float32)
    gradient = tl.zeros([OWN, WIDTH], tl.float32)
    for start in range(0, size_y, OTHER):
        item_place = start + tl.arange(0, OTHER)
        listed = item_place < size_y
        item = tl.load(bucket_items + bucket * size_y + item_place, mask=listed, other=0)
        logits = row_products(
            factor, hidden, token, valid, item_embeddings, item, listed, D, STEP, DTYPE
        )
        p = tl.exp2((logits - positive[:, None] - loss[:, None]) * LOG2_E)
        p = tl.where(listed[None, :] & (item[None, :] != target[:, None]), p, 0.0)
        total += tl.sum(p, 1)
        w = cast(load_rows(item_embeddings, item, listed, first_column, D, WIDTH), DTYPE)
        gradient = dot(cast(p * scale, DTYPE), w, gradient)
    known = valid & (target >= 0) & (target < n_items)
    embedding = load_rows(item_embeddings, target, known, first_column, D, WIDTH).to(tl.float32)
    weight = tl.load(grad) / tl.load(covered).to(tl.float32)
    gradient = (gradient / scale - total[:, None] * embedding) * weight
    gradient = cast(gradient, grad_hidden.dtype.element_ty)
    column = first_column + tl.arange(0, WIDTH)
    pointers = grad_hidden + token.to(tl.int64)[:, None] * D + column[None, :]
    tl.store(pointers, gradient, mask=valid[:, None] & (column < D)[None, :])
    if first_column == 0:
        tl.store(rests + token, total, mask=valid)


@triton.jit(do_not_specialize=["n_items", "size_x", "size_y"])
def _table_gradient(
    hidden,
    item_embeddings,
    targets,
    bucket_items,
    keys,
    positives,
    winners,
    counts,
    covered,
    grad,
    rests,
    sums,
    n_items,
    size_x,
    size_y,
    D: tl.constexpr,
    STEP: tl.constexpr,
    FIRST: tl.constexpr,
    SUMMED: tl.constexpr,
    WIDTH: tl.constexpr,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Add Σ p x over the winners to some items of a bucket; its last program does the targets.

    ``sums`` holds SUMMED columns from column FIRST on, of which a program adds to WIDTH.
    """
    bucket = tl.program_id(1).to(tl.int64)
    count = tl.load(counts + bucket)
    if count == 0:
        return
    scale: tl.constexpr = P_SCALE if DTYPE == tl.float16 else 1.0
    weight = tl.load(grad) / tl.load(covered).to(tl.float32)
    first_sum = tl.program_id(2) * WIDTH
    first_column = FIRST + first_sum
    sum_column = first_sum + tl.arange(0, WIDTH)
    inside = (sum_column < SUMMED) & (FIRST + sum_column < D)
    first_item = tl.program_id(0) * OWN
    if first_item >= size_y:
        for start in range(0, count, TARGETS_BLOCK):
            place = start + tl.arange(0, TARGETS_BLOCK)
            valid = place < count
            token = tl.load(winners + bucket * size_x + place, mask=valid, other=0)
            target = tl.load(targets + token, mask=valid, other=-1)
            rest = tl.load(rests + token, mask=valid, other=0.0)
            known = (target >= 0) & (target < n_items)
            x = load_rows(hidden, token, known, first_column, D, WIDTH).to(tl.float32)
            pointers = sums + target[:, None] * SUMMED + sum_column[None, :]
            mask = known[:, None] & inside[None, :]
            tl.atomic_add(pointers, -weight * rest[:, None] * x, mask=mask, sem="relaxed")
        return
    item_place = first_item + tl.arange(0, OWN)
    listed = item_place < size_y
    item = tl.load(bucket_items + bucket * size_y + item_place, mask=listed, other=0)
    factor = cast(load_rows(item_embeddings, item, listed, 0, D, STEP), DTYPE)
    gradient = tl.zeros([OWN, WIDTH], tl.float32)
    for start in range(0, count, OTHER):
        place = start + tl.arange(0, OTHER)
        valid = place < count
        token = tl.load(winners + bucket * size_x + place, mask=valid, other=0)
        target = tl.load(targets + token, mask=valid, other=0)
        positive = tl.load(positives + token, mask=valid, other=0.0)
        loss = _loss(tl.load(keys + token, mask=valid, other=0))
        logits = row_products(
            factor, item_embeddings, item, listed, hidden, token, valid, D, STEP, DTYPE
        )
        p = tl.exp2((logits - positive[None, :] - loss[None, :]) * LOG2_E)
        p = tl.where(valid[None, :] & (item[:, None] != target[None, :]), p, 0.0)
        x = cast(load_rows(hidden, token, valid, first_column, D, WIDTH), DTYPE)
        gradient = dot(cast(p * scale, DTYPE), x, gradient)
    pointers = sums + item[:, None] * SUMMED + sum_column[None, :]
    mask = listed[:, None] & inside[None, :]
    tl.atomic_add(pointers, gradient * (weight / scale), mask=mask, sem="relaxed")


@triton.jit(do_not_specialize=["n_items"])
def _round_sums(
    sums,
    grad_table,
    n_items,
    FIRST: tl.constexpr,
    SUMMED: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Store the sums of SUMMED columns from column FIRST on, and clear them for the next ones."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    inside = (row < n_items)[:, None] & (column < SUMMED)[None, :]
    pointers = sums + row[:, None] * SUMMED + column[None, :]
    values = cast(tl.load(pointers, mask=inside, other=0.0), grad_table.dtype.element_ty)
    column += FIRST
    own = inside & (column < D)[None, :]
    tl.store(grad_table + row[:, None] * D + column[None, :], values, mask=own)
    if FIRST + SUMMED < D:
        tl.store(pointers, tl.zeros([ROWS, WIDTH], tl.float32), mask=inside)
