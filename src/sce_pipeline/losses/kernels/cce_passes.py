"""The two passes of exact cross-entropy: over all items for tokens, over all tokens for items.

With z_ic = τ·u_i·v_c·(x_i·w_c) + β_c and p_i = softmax(z_i), the gradients need Σ_c p_ic w_c and
Σ_i p_ic x_i: each is a pass of attention whose values are its keys, and no logit is ever stored.
Logits are kept in base 2, as exp2 is what the hardware computes. The target's own term is taken out
of the sums and put back in float32 at the end, since p - 1 would be lost in a rounded p.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sce_pipeline.losses.kernels.common import LN_2, LOG2_E, dot, log1p
from sce_pipeline.losses.kernels.rows import cast, load_rows

SAFE_BITS = tl.constexpr(100)
"""exp2 of numbers that lie so little below the largest is a normal number, and so are its sums."""

TARGET_BLOCK = tl.constexpr(32)
"""Tokens of a block's targets that are taken at a time."""

# Batches differ in size, and a new size must not make Triton compile again.
_SIZES = ["n_tokens", "n_items", "n_whole", "n_shares", "tiles_per_share"]


@triton.jit(do_not_specialize=["n"])
def row_norms_kernel(rows, norms, n, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store the norm of each row."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = load_rows(rows, row, row < n, 0, D, BLOCK_D).to(tl.float32)
    tl.store(norms + row, tl.sqrt(tl.sum(values * values, 1)), mask=row < n)


@triton.jit
def _load_targets(targets, token, mask, n_items):
    """Return the tokens' targets, -1 for one out of range."""
    target = tl.load(targets + token, mask=mask, other=-1)
    return tl.where((target >= 0) & (target < n_items), target, -1).to(tl.int32)


@triton.jit
def _store_rows(rows, row, mask, values, D: tl.constexpr, BLOCK_D: tl.constexpr):
    column = tl.arange(0, BLOCK_D)
    pointers = rows + row.to(tl.int64)[:, None] * D + column[None, :]
    tl.store(
        pointers, cast(values, rows.dtype.element_ty), mask=mask[:, None] & (column < D)[None, :]
    )


@triton.jit
def _load_tile(
    rows, tile, n, D: tl.constexpr, TILE: tl.constexpr, BLOCK_D: tl.constexpr, DESC: tl.constexpr
):
    if DESC:
        values = rows.load([tile * TILE, 0])
    else:
        row = tile * TILE + tl.arange(0, TILE)
        values = load_rows(rows, row, row < n, 0, D, BLOCK_D)
    return values


@triton.jit
def _unit(pid, n_whole, n_shares, tiles_per_share, n_tiles):
    """Return a program's block and its first and last tile."""
    block = pid
    first = 0
    last = n_tiles
    if pid >= n_whole:
        block = n_whole + (pid - n_whole) // n_shares
        first = (pid - n_whole) % n_shares * tiles_per_share
        last = tl.minimum(first + tiles_per_share, n_tiles)
    return block, first, last


@triton.jit
def _base2_logits(
    products, factor, bias, item_scale, item, HAS_BIAS: tl.constexpr, NORMALIZED: tl.constexpr,
    n_items, AXIS: tl.constexpr,
):  # fmt: skip
    """Return logits in base 2 from inner products; items lie along ``AXIS``."""
    z = products * factor
    if NORMALIZED:
        scale = tl.load(item_scale + item, mask=item < n_items, other=0.0)
        z = z * tl.expand_dims(scale, 1 - AXIS)
    if HAS_BIAS:
        addend = tl.load(bias + item, mask=item < n_items, other=0.0) * LOG2_E
        z = z + tl.expand_dims(addend, 1 - AXIS)
    return z


@triton.jit
def _hidden_tile(
    x_tile, w_tile, item, target, factor, maximum, total, acc, skip, bias, item_scale, n_items,
    FAST: tl.constexpr, RAGGED: tl.constexpr, GRAD: tl.constexpr, SKIP: tl.constexpr,
    HAS_BIAS: tl.constexpr, NORMALIZED: tl.constexpr, P_SCALE: tl.constexpr,
):  # fmt: skip
    """Add a tile of items to a block of tokens' running sums of exp2(z - maximum)."""
    zeros = tl.zeros([x_tile.shape[0], w_tile.shape[0]], tl.float32)
    products = dot(x_tile, tl.trans(w_tile), zeros)
    z = _base2_logits(
        products, factor[:, None], bias, item_scale, item, HAS_BIAS, NORMALIZED, n_items, 1
    )
    if FAST:  # the maximum is a bound that holds for all items, and the target is taken out later
        p = tl.exp2(z - maximum[:, None])
        if RAGGED:
            p = tl.where((item < n_items)[None, :], p, 0.0)
    else:
        z = tl.where((item == n_items)[None, :] | (item > n_items)[None, :], float("-inf"), z)
        z = tl.where(item[None, :] == target[:, None], float("-inf"), z)
        higher = tl.maximum(maximum, tl.max(z, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(z - base[:, None])
        shrink = tl.exp2(maximum - base)
        total = total * shrink
        acc = acc * shrink[:, None]
        maximum = higher
    mass = tl.sum(p, 1)
    total += mass
    if GRAD:
        if NORMALIZED:
            p = p * tl.load(item_scale + item, mask=item < n_items, other=0.0)[None, :]
        if SKIP:
            # The total so far is at most the final one, so that no share is taken for too small.
            # A target's own tile is never left out: its term is taken out of the sums later.
            has_target = (target >= tl.min(item, 0)) & (target <= tl.max(item, 0))
            if tl.max(((mass > skip * total) | has_target).to(tl.int32), 0) > 0:
                acc = dot(cast(p * P_SCALE, w_tile.dtype), w_tile, acc)
        else:
            acc = dot(cast(p * P_SCALE, w_tile.dtype), w_tile, acc)
    return maximum, total, acc


@triton.jit(do_not_specialize=_SIZES)
def hidden_kernel(
    w_tiles, tiles_per_share, skip,
    x, w, targets, bias, token_scale, item_scale, mean_item, bounds, mean_bias,
    losses, lse, target_weights, grad, parts, part_sums, part_maxima, part_safe,
    n_tokens, n_items, n_whole, n_shares, scale, smoothing, z_loss,
    TILE: tl.constexpr, DESCRIPTOR: tl.constexpr, SKIP: tl.constexpr,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, GRAD: tl.constexpr,
    FAST: tl.constexpr, P_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, NORMALIZED: tl.constexpr,
    SMOOTHED: tl.constexpr, Z_LOSS: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    """Sum exp2 of the logits, and items so weighted, for a block of tokens or a share of one."""
    pid = tl.program_id(0)
    n_tiles = tl.cdiv(n_items, TILE)
    block, first, last = _unit(pid, n_whole, n_shares, tiles_per_share, n_tiles)
    token = block * BLOCK + tl.arange(0, BLOCK)
    x_tile = load_rows(x, token, token < n_tokens, 0, D, BLOCK_D)
    target = _load_targets(targets, token, token < n_tokens, n_items)
    factor = _token_factor(token_scale, token, n_tokens, scale, NORMALIZED)
    acc = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    column = tl.arange(0, TILE)
    bound, safe = _bound(x_tile, factor, bounds, FAST, HAS_BIAS)
    maximum = bound
    if safe:
        n_full = n_items // TILE
        for tile in tl.range(first, tl.minimum(last, n_full)):
            w_tile = _load_tile(w_tiles, tile, n_items, D, TILE, BLOCK_D, DESCRIPTOR)
            maximum, total, acc = _hidden_tile(
                x_tile, w_tile, tile * TILE + column, target, factor, maximum, total, acc, skip,
                bias, item_scale, n_items, True, False, GRAD, SKIP, HAS_BIAS, NORMALIZED, P_SCALE,
            )  # fmt: skip
        for tile in tl.range(tl.maximum(first, n_full), last, num_stages=1):
            w_tile = _load_tile(w_tiles, tile, n_items, D, TILE, BLOCK_D, DESCRIPTOR)
            maximum, total, acc = _hidden_tile(
                x_tile, w_tile, tile * TILE + column, target, factor, maximum, total, acc, skip,
                bias, item_scale, n_items, True, True, GRAD, SKIP, HAS_BIAS, NORMALIZED, P_SCALE,
            )  # fmt: skip
    else:
        maximum = tl.full([BLOCK], float("-inf"), tl.float32)
        # Where this path is the rare one, it leaves the shared memory to the other.
        for tile in tl.range(first, last, num_stages=1 if FAST else None):
            w_tile = _load_tile(w_tiles, tile, n_items, D, TILE, BLOCK_D, DESCRIPTOR)
            maximum, total, acc = _hidden_tile(
                x_tile, w_tile, tile * TILE + column, target, factor, maximum, total, acc, skip,
                bias, item_scale, n_items, False, True, GRAD, SKIP, HAS_BIAS, NORMALIZED, P_SCALE,
            )  # fmt: skip
    if pid < n_whole:
        _finish_hidden(
            token, x_tile, target, factor, safe, maximum, total, acc,
            x, w, bias, token_scale, item_scale, mean_item, mean_bias,
            losses, lse, target_weights, grad, n_tokens, n_items, scale, smoothing, z_loss,
            D, BLOCK, BLOCK_D, GRAD, P_SCALE, HAS_BIAS, NORMALIZED, SMOOTHED, Z_LOSS, PARTIAL,
        )  # fmt: skip
    else:
        row = (pid - n_whole) * BLOCK + tl.arange(0, BLOCK)
        tl.store(part_sums + row, total)
        tl.store(part_maxima + row, maximum)
        tl.store(part_safe + pid - n_whole, tl.where(safe, 1, 0))
        if GRAD:
            _store_rows(parts, row, row >= 0, acc, BLOCK_D, BLOCK_D)


@triton.jit(do_not_specialize=_SIZES[:-1])
def join_hidden_kernel(
    x, w, targets, bias, token_scale, item_scale, mean_item, bounds, mean_bias,
    losses, lse, target_weights, grad, parts, part_sums, part_maxima, part_safe,
    n_tokens, n_items, n_whole, n_shares, scale, smoothing, z_loss,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, GRAD: tl.constexpr,
    FAST: tl.constexpr, P_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, NORMALIZED: tl.constexpr,
    SMOOTHED: tl.constexpr, Z_LOSS: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    """Join the shares of a block of tokens."""
    token = (n_whole + tl.program_id(0)) * BLOCK + tl.arange(0, BLOCK)
    x_tile = load_rows(x, token, token < n_tokens, 0, D, BLOCK_D)
    target = _load_targets(targets, token, token < n_tokens, n_items)
    factor = _token_factor(token_scale, token, n_tokens, scale, NORMALIZED)
    safe = tl.load(part_safe + tl.program_id(0) * n_shares) == 1
    maximum = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for share in tl.range(n_shares):
        row = (tl.program_id(0) * n_shares + share) * BLOCK + tl.arange(0, BLOCK)
        part_maximum = tl.load(part_maxima + row)
        higher = tl.maximum(maximum, part_maximum)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = tl.exp2(maximum - base)
        grow = tl.exp2(part_maximum - base)
        total = total * shrink + tl.load(part_sums + row) * grow
        if GRAD:
            part = load_rows(parts, row, row >= 0, 0, BLOCK_D, BLOCK_D)
            acc = acc * shrink[:, None] + part * grow[:, None]
        maximum = higher
    _finish_hidden(
        token, x_tile, target, factor, safe, maximum, total, acc,
        x, w, bias, token_scale, item_scale, mean_item, mean_bias,
        losses, lse, target_weights, grad, n_tokens, n_items, scale, smoothing, z_loss,
        D, BLOCK, BLOCK_D, GRAD, P_SCALE, HAS_BIAS, NORMALIZED, SMOOTHED, Z_LOSS, PARTIAL,
    )  # fmt: skip


@triton.jit
def _token_factor(token_scale, token, n_tokens, scale, NORMALIZED: tl.constexpr):
    """Return what turns a token's inner products into logits of base 2."""
    factor = tl.zeros_like(token).to(tl.float32) + scale * LOG2_E
    if NORMALIZED:
        factor = factor * tl.load(token_scale + token, mask=token < n_tokens, other=0.0)
    return factor


@triton.jit
def _bound(x_tile, factor, bounds, FAST: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Return a bound of each token's logits, and whether none of a block is too far below it."""
    if FAST:
        wide = x_tile.to(tl.float32)
        norm = tl.sqrt(tl.sum(wide * wide, 1))
        bound = norm * tl.abs(factor) * tl.load(bounds)
        span = 2 * bound
        if HAS_BIAS:
            lowest = tl.load(bounds + 1) * LOG2_E
            highest = tl.load(bounds + 2) * LOG2_E
            bound += highest
            span += highest - lowest
        safe = tl.max(span, 0) < SAFE_BITS
    else:
        bound = factor
        safe = False
    return bound, safe


@triton.jit
def _finish_hidden(
    token, x_tile, target, factor, safe, maximum, total, acc,
    x, w, bias, token_scale, item_scale, mean_item, mean_bias,
    losses, lse, target_weights, grad, n_tokens, n_items, scale, smoothing, z_loss,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, GRAD: tl.constexpr,
    P_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, NORMALIZED: tl.constexpr,
    SMOOTHED: tl.constexpr, Z_LOSS: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    """Take the targets' terms out of the sums, and store what the sums are for.

    Where PARTIAL, the items are not the whole catalogue: what is stored is to be joined with what
    the rest of it gives.
    """
    is_token = token < n_tokens
    valid = is_token & (target >= 0)
    w_target = load_rows(w, target, valid, 0, D, BLOCK_D)
    # The diagonal of a product on the same units has the very bits that entered the sums.
    square = dot(x_tile, tl.trans(w_target), tl.zeros([BLOCK, BLOCK], tl.float32))
    row = tl.arange(0, BLOCK)
    products = tl.sum(tl.where(row[:, None] == row[None, :], square, 0.0), 1)
    z_target = products * factor
    item_factor = tl.full([BLOCK], 1.0, tl.float32)
    if NORMALIZED:
        item_factor = tl.load(item_scale + target, mask=valid, other=0.0)
        z_target = z_target * item_factor
    if HAS_BIAS:
        z_target = z_target + tl.load(bias + target, mask=valid, other=0.0) * LOG2_E
    wide_target = w_target.to(tl.float32)
    if safe:
        term = tl.exp2(z_target - maximum)
        total = tl.maximum(total - tl.where(valid, term, 0.0), 0.0)
        if GRAD:
            rounded = cast(term * item_factor, w_target.dtype).to(tl.float32)
            acc = acc - rounded[:, None] * wide_target

    if PARTIAL:
        _store_parts(
            token, z_target, maximum, total, acc, lse, target_weights, grad, n_tokens,
            D, BLOCK_D, GRAD, P_SCALE,
        )  # fmt: skip
    else:
        _store_losses(
            token, valid, x_tile, wide_target, item_factor, z_target, factor, maximum, total, acc,
            token_scale, mean_item, mean_bias, losses, lse, target_weights, grad, n_tokens,
            scale, smoothing, z_loss,
            D, BLOCK, BLOCK_D, GRAD, P_SCALE, HAS_BIAS, NORMALIZED, SMOOTHED, Z_LOSS,
        )  # fmt: skip


@triton.jit
def _store_parts(
    token, z_target, maximum, total, acc, others, of_target, mean, n_tokens,
    D: tl.constexpr, BLOCK_D: tl.constexpr, GRAD: tl.constexpr, P_SCALE: tl.constexpr,
):  # fmt: skip
    """Store the other items' logsumexp and mean, and the target's logit, 0 if others have it."""
    is_token = token < n_tokens
    tl.store(others + token, maximum + tl.log2(total), mask=is_token)
    tl.store(of_target + token, z_target, mask=is_token)  # 0 where no row was loaded for it
    if GRAD:
        share = 1.0 / (total * P_SCALE)
        share = tl.where(total > 0.0, share, tl.where(total == total, 0.0, total))
        _store_rows(mean, token, is_token, acc * share[:, None], D, BLOCK_D)


@triton.jit
def _store_losses(
    token, valid, x_tile, wide_target, item_factor, z_target, factor, maximum, total, acc,
    token_scale, mean_item, mean_bias, losses, lse, target_weights, grad, n_tokens,
    scale, smoothing, z_loss,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, GRAD: tl.constexpr,
    P_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, NORMALIZED: tl.constexpr,
    SMOOTHED: tl.constexpr, Z_LOSS: tl.constexpr,
):  # fmt: skip
    """Put the targets' terms beside the sums over the other items, and store."""
    is_token = token < n_tokens
    highest = tl.maximum(maximum, z_target)
    of_others = total * tl.exp2(maximum - highest)
    of_target = tl.exp2(z_target - highest)
    everything = of_others + of_target
    log2_sum = highest + tl.log2(everything)
    log_sum = log2_sum * LN_2
    ratio = of_others / of_target
    loss = tl.where(ratio < 1.0, log1p(ratio), log_sum - z_target * LN_2)
    miss = of_others / everything
    weight = -miss
    row_factor = tl.full([BLOCK], 1.0, tl.float32)
    if Z_LOSS:
        row_factor = 1.0 + 2.0 * z_loss * log_sum
        weight = (row_factor - 1.0) - row_factor * miss
    wide = x_tile.to(tl.float32)
    if SMOOTHED:
        column = tl.arange(0, BLOCK_D)
        mean = tl.load(mean_item + column, mask=column < D, other=0.0)
        mean_logit = tl.sum(wide * mean[None, :], 1) * factor * LN_2
        if HAS_BIAS:
            mean_logit += tl.load(mean_bias)
        loss = (1.0 - smoothing) * loss + smoothing * (log_sum - mean_logit)
        weight += smoothing
    if Z_LOSS:
        loss += z_loss * log_sum * log_sum
    tl.store(losses + token, tl.where(valid, loss, float("nan")), mask=is_token)
    tl.store(lse + token, log2_sum, mask=is_token)
    tl.store(target_weights + token, weight, mask=is_token)
    if GRAD:
        share = row_factor * tl.exp2(maximum - highest) / everything * (1.0 / P_SCALE)
        # Where no other item is, the sums are 0 and the maximum may be -inf.
        share = tl.where(total > 0.0, share, tl.where(total == total, 0.0, total))
        gradient = acc * share[:, None] + (weight * item_factor)[:, None] * wide_target
        if SMOOTHED:
            gradient -= smoothing * mean[None, :]
        gradient *= scale
        if NORMALIZED:
            unit = tl.load(token_scale + token, mask=is_token, other=0.0)
            along = tl.sum(gradient * wide, 1) * unit * unit
            gradient = unit[:, None] * (gradient - along[:, None] * wide)
        _store_rows(grad, token, is_token, gradient, D, BLOCK_D)


@triton.jit
def _probabilities(
    x_tile, w_tile, item, token, lse, factor, bias, item_scale, token_scale, n_tokens, n_items,
    HAS_BIAS: tl.constexpr, NORMALIZED: tl.constexpr,
):  # fmt: skip
    """Return the softmax of a block of items (rows) for a tile of tokens (columns)."""
    zeros = tl.zeros([w_tile.shape[0], x_tile.shape[0]], tl.float32)
    products = dot(w_tile, tl.trans(x_tile), zeros)
    if NORMALIZED:
        unit = tl.load(token_scale + token, mask=token < n_tokens, other=0.0)
        products = products * unit[None, :]
    z = _base2_logits(products, factor, bias, item_scale, item, HAS_BIAS, NORMALIZED, n_items, 0)
    return tl.exp2(z - tl.load(lse + token)[None, :])


@triton.jit
def _token_weights(
    p, token, lse, token_scale, n_tokens, z_loss, NORMALIZED: tl.constexpr, Z_LOSS: tl.constexpr
):
    """Return ``p`` times 1 + 2λ·lse, and that times u, each [items, tokens]."""
    by_logit = p
    if Z_LOSS:
        log_sum = tl.load(lse + token, mask=token < n_tokens, other=0.0) * LN_2
        by_logit = p * (1.0 + 2.0 * z_loss * log_sum)[None, :]
    by_product = by_logit
    if NORMALIZED:
        unit = tl.load(token_scale + token, mask=token < n_tokens, other=0.0)
        by_product = by_logit * unit[None, :]
    return by_logit, by_product


@triton.jit(do_not_specialize=_SIZES)
def table_kernel(
    x_tiles, tiles_per_share, skip,
    x, w, targets, bias, token_scale, item_scale, sum_token, lse, target_weights, order, first_of,
    upstream, grad, grad_bias, parts, bias_parts,
    n_tokens, n_items, n_whole, n_shares, scale, smoothing, z_loss,
    TILE: tl.constexpr, DESCRIPTOR: tl.constexpr, SKIP: tl.constexpr,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, EXACT: tl.constexpr,
    P_SCALE: tl.constexpr, GRAD_BIAS: tl.constexpr, HAS_BIAS: tl.constexpr,
    NORMALIZED: tl.constexpr, SMOOTHED: tl.constexpr, Z_LOSS: tl.constexpr,
):  # fmt: skip
    """Sum the tokens weighted by their softmax for a block of items, or a share of one."""
    pid = tl.program_id(0)
    n_tiles = tl.cdiv(n_tokens, TILE)
    block, first, last = _unit(pid, n_whole, n_shares, tiles_per_share, n_tiles)
    item = block * BLOCK + tl.arange(0, BLOCK)
    w_tile = load_rows(w, item, item < n_items, 0, D, BLOCK_D)
    factor = scale * LOG2_E
    acc = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    bias_acc = tl.zeros([BLOCK], tl.float32)
    column = tl.arange(0, TILE)
    for tile in tl.range(first, last):
        token = tile * TILE + column
        x_tile = _load_tile(x_tiles, tile, n_tokens, D, TILE, BLOCK_D, DESCRIPTOR)
        p = _probabilities(
            x_tile, w_tile, item, token, lse, factor, bias, item_scale, token_scale,
            n_tokens, n_items, HAS_BIAS, NORMALIZED,
        )  # fmt: skip
        if EXACT:
            target = _load_targets(targets, token, token < n_tokens, n_items)
            p = tl.where(item[:, None] == target[None, :], 0.0, p)
        if SKIP:
            target = _load_targets(targets, token, token < n_tokens, n_items)
            has_target = (target >= block * BLOCK) & (target < (block + 1) * BLOCK)
            in_block = tl.where((item < n_items)[:, None], p, 0.0)
            needed = tl.max(((tl.sum(in_block, 0) > skip) | has_target).to(tl.int32), 0) > 0
        by_logit, by_product = _token_weights(
            p, token, lse, token_scale, n_tokens, z_loss, NORMALIZED, Z_LOSS
        )
        if GRAD_BIAS:
            bias_acc += tl.sum(by_logit, 1)
        if SKIP:
            if needed:
                acc = dot(cast(by_product * P_SCALE, x_tile.dtype), x_tile, acc)
        else:
            acc = dot(cast(by_product * P_SCALE, x_tile.dtype), x_tile, acc)
    if pid < n_whole:
        _finish_table(
            block, item, w_tile, acc, bias_acc,
            x, targets, bias, token_scale, item_scale, sum_token, lse, target_weights, order,
            first_of, upstream, grad, grad_bias, n_tokens, n_items, scale, smoothing, z_loss,
            D, BLOCK, BLOCK_D, EXACT, P_SCALE, GRAD_BIAS, HAS_BIAS, NORMALIZED, SMOOTHED, Z_LOSS,
        )  # fmt: skip
    else:
        row = (pid - n_whole) * BLOCK + tl.arange(0, BLOCK)
        _store_rows(parts, row, row >= 0, acc, BLOCK_D, BLOCK_D)
        tl.store(bias_parts + row, bias_acc)


@triton.jit(do_not_specialize=_SIZES[:-1])
def join_table_kernel(
    x, w, targets, bias, token_scale, item_scale, sum_token, lse, target_weights, order, first_of,
    upstream, grad, grad_bias, parts, bias_parts,
    n_tokens, n_items, n_whole, n_shares, scale, smoothing, z_loss,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, EXACT: tl.constexpr,
    P_SCALE: tl.constexpr, GRAD_BIAS: tl.constexpr, HAS_BIAS: tl.constexpr,
    NORMALIZED: tl.constexpr, SMOOTHED: tl.constexpr, Z_LOSS: tl.constexpr,
):  # fmt: skip
    """Join the shares of a block of items."""
    block = n_whole + tl.program_id(0)
    item = block * BLOCK + tl.arange(0, BLOCK)
    w_tile = load_rows(w, item, item < n_items, 0, D, BLOCK_D)
    acc = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    bias_acc = tl.zeros([BLOCK], tl.float32)
    for share in tl.range(n_shares):
        row = (tl.program_id(0) * n_shares + share) * BLOCK + tl.arange(0, BLOCK)
        acc += load_rows(parts, row, row >= 0, 0, BLOCK_D, BLOCK_D)
        bias_acc += tl.load(bias_parts + row)
    _finish_table(
        block, item, w_tile, acc, bias_acc,
        x, targets, bias, token_scale, item_scale, sum_token, lse, target_weights, order,
        first_of, upstream, grad, grad_bias, n_tokens, n_items, scale, smoothing, z_loss,
        D, BLOCK, BLOCK_D, EXACT, P_SCALE, GRAD_BIAS, HAS_BIAS, NORMALIZED, SMOOTHED, Z_LOSS,
    )  # fmt: skip


@triton.jit
def _finish_table(
    block, item, w_tile, acc, bias_acc,
    x, targets, bias, token_scale, item_scale, sum_token, lse, target_weights, order, first_of,
    upstream, grad, grad_bias, n_tokens, n_items, scale, smoothing, z_loss,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, EXACT: tl.constexpr,
    P_SCALE: tl.constexpr, GRAD_BIAS: tl.constexpr, HAS_BIAS: tl.constexpr,
    NORMALIZED: tl.constexpr, SMOOTHED: tl.constexpr, Z_LOSS: tl.constexpr,
):  # fmt: skip
    """Replace the targets' probabilities by the derivatives of the losses, and store."""
    stop = tl.load(first_of + block + 1)
    for start in tl.range(tl.load(first_of + block), stop, TARGET_BLOCK):
        place = start + tl.arange(0, TARGET_BLOCK)
        token = tl.load(order + place, mask=place < stop, other=0)
        x_tile = load_rows(x, token, place < stop, 0, D, BLOCK_D)
        target = _load_targets(targets, token, place < stop, n_items)
        weight = tl.load(target_weights + token, mask=place < stop, other=0.0)
        is_target = (item[:, None] == target[None, :]) & (place < stop)[None, :]
        by_logit = tl.where(is_target, weight[None, :], 0.0)
        by_product = by_logit
        if NORMALIZED:
            unit = tl.load(token_scale + token, mask=place < stop, other=0.0)
            by_product = by_logit * unit[None, :]
        if not EXACT:
            p = _probabilities(
                x_tile, w_tile, item, token, lse, scale * LOG2_E, bias, item_scale, token_scale,
                n_tokens, n_items, HAS_BIAS, NORMALIZED,
            )  # fmt: skip
            p_logit, p_product = _token_weights(
                p, token, lse, token_scale, n_tokens, z_loss, NORMALIZED, Z_LOSS
            )
            # What was added was rounded, and on the same units: the same bits are taken out.
            rounded = cast(p_product * P_SCALE, x_tile.dtype).to(tl.float32) / P_SCALE
            by_product = by_product - tl.where(is_target, rounded, 0.0)
            by_logit = by_logit - tl.where(is_target, p_logit, 0.0)
        if GRAD_BIAS:
            bias_acc += tl.sum(by_logit, 1)
        high = cast(by_product * P_SCALE, x_tile.dtype)
        acc = dot(high, x_tile, acc)
        if x_tile.dtype != tl.float32:
            low = cast(by_product * P_SCALE - high.to(tl.float32), x_tile.dtype)
            acc = dot(low, x_tile, acc)
    factor = tl.load(upstream).to(tl.float32) / n_tokens
    gradient = acc * (1.0 / P_SCALE)
    if SMOOTHED:
        column = tl.arange(0, BLOCK_D)
        everyone = tl.load(sum_token + column, mask=column < D, other=0.0)
        gradient -= smoothing / n_items * everyone[None, :]
    gradient *= scale * factor
    if NORMALIZED:
        wide = w_tile.to(tl.float32)
        unit = tl.load(item_scale + item, mask=item < n_items, other=0.0)
        along = tl.sum(gradient * wide, 1) * unit * unit
        gradient = unit[:, None] * (gradient - along[:, None] * wide)
    _store_rows(grad, item, item < n_items, gradient, D, BLOCK_D)
    if GRAD_BIAS:
        if SMOOTHED:
            bias_acc -= smoothing * n_tokens / n_items
        tl.store(grad_bias + item, bias_acc * factor, mask=item < n_items)
