"""Kernels over negatives of each token's own: see ``sampled``, which launches them."""

from __future__ import annotations

import triton
import triton.language as tl

from sce_pipeline.losses.kernels.common import LN_2, LOG2_E, sigmoid, softplus
from sce_pipeline.losses.kernels.rows import cast, load_rows

COIN_MASK = tl.constexpr(2**31 - 1)

RUN = tl.constexpr(64)
"""Tokens, sorted by target, whose gradient of it is summed before where all have the same."""

# No number that differs from batch to batch may make Triton compile again.
DRAWN = [
    "n_tokens",
    "n_items",
    "n_negatives",
    "coin_step",
    "a",
    "a_share",
    "b",
    "b_share",
    "c",
    "c_share",
]


@triton.jit(do_not_specialize=DRAWN)
def forward_kernel(
    hidden,
    table,
    targets,
    losses,
    grad_hidden,
    shares,
    log_sums,
    beta,
    offsets,
    coins,
    thresholds,
    aliases,
    log_chances,
    log_rests,
    n_tokens,
    n_items,
    n_negatives,
    coin_step,
    a,
    a_share,
    b,
    b_share,
    c,
    c_share,
    BITS: tl.constexpr,
    D: tl.constexpr,
    BINARY: tl.constexpr,
    CORRECTED: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Some tokens of a segment meet their negatives, a few slots at a time."""
    n_blocks = tl.cdiv(tl.minimum(n_tokens, n_items), ROWS)
    segment = tl.program_id(0) // n_blocks
    place = tl.program_id(0) % n_blocks * ROWS + tl.arange(0, ROWS)
    is_place = place < tl.minimum(n_items, n_tokens - segment * n_items)
    token = segment * n_items + place
    columns = tl.arange(0, BLOCK_D)
    in_row = columns < D
    own = token.to(tl.int64)[:, None] * D + columns[None, :]
    is_own = is_place[:, None] & in_row[None, :]
    query = tl.load(hidden + own, mask=is_own, other=0.0).to(tl.float32)
    target = tl.load(targets + token, mask=is_place, other=-1)
    is_item = (target >= 0) & (target < n_items)
    of_target = table + target[:, None] * D + columns[None, :]
    is_target = is_item[:, None] & in_row[None, :]
    embedding = tl.load(of_target, mask=is_target, other=0.0).to(tl.float32)
    positive = tl.where(is_item, tl.sum(query * embedding, axis=1), float("nan"))
    target = tl.where(is_item, target, -1).to(tl.int32)

    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    n_valid = tl.zeros([ROWS], tl.float32)
    # In three dimensions, all that the loop holds stays in the registers that its loads fill.
    sums = tl.zeros([ROWS, 1, BLOCK_D], tl.float32)
    for start in range(0, n_negatives, SLOTS):
        slot = start + tl.arange(0, SLOTS)[None, :]
        is_valid = is_place[:, None] & (slot < n_negatives)
        at = tl.broadcast_to(segment.to(tl.int64) * n_negatives + slot, [ROWS, SLOTS])
        cell = place[:, None] - (n_items - tl.load(offsets + at, mask=is_valid, other=0))
        cell = tl.where(cell < 0, cell + n_items, cell)
        item = _relabel(cell, a, a_share, b, b_share, c, c_share, n_items, False, BITS)
        if thresholds is not None:
            coin = _toss(tl.load(coins + at, mask=is_valid, other=0), item, coin_step)
            is_alias = is_valid & (coin > tl.load(thresholds + item, mask=is_valid, other=0))
            item = tl.load(aliases + item, mask=is_alias, other=item)
        is_valid = is_valid & (item != target[:, None])
        keys = _load_rows(table, item, is_valid, D, BLOCK_D)
        logits = tl.sum(keys * query[:, None, :], axis=2)
        if BINARY:
            total += tl.sum(tl.where(is_valid, softplus(logits), 0.0), axis=1)
            factors = tl.where(is_valid, sigmoid(logits), 0.0)
        else:
            if CORRECTED and thresholds is not None:
                logits -= tl.load(log_chances + item, mask=is_valid, other=0.0)
            logits = tl.where(is_valid, logits, float("-inf"))
            n_valid += tl.sum(tl.where(logits == float("-inf"), 0.0, 1.0), axis=1)
            larger = tl.maximum(largest, tl.max(logits, axis=1))
            centre = tl.where(larger == float("-inf"), 0.0, larger)
            fade = tl.exp2((largest - centre) * LOG2_E)
            factors = tl.exp2((logits - centre[:, None]) * LOG2_E)
            total = total * fade + tl.sum(factors, axis=1)
            sums *= fade[:, None, None]
            largest = larger
        if grad_hidden is not None:
            sums += tl.sum(factors[:, :, None] * keys, axis=1, keep_dims=True)
    gradient = tl.sum(sums, axis=1)

    if BINARY:
        loss = beta * softplus(-positive) + total
        share = beta * sigmoid(-positive)
    else:
        correction = tl.zeros([ROWS], tl.float32)
        if CORRECTED:
            if thresholds is not None:
                correction += tl.load(log_rests + target, mask=is_item, other=0.0)
            else:
                correction += tl.log(tl.maximum(n_items - 1, 1).to(tl.float32))
            correction -= tl.log(tl.maximum(n_valid, 1.0))
        # Of the odds against the target, as logsumexp(all) - positive would cancel where it has
        # nearly all of the sum. No valid negative has none.
        log_odds = tl.where(
            n_valid == 0, float("-inf"), largest + tl.log2(total) * LN_2 + correction - positive
        )
        log_odds = tl.where(positive == positive, log_odds, float("nan"))
        loss = softplus(log_odds)
        share = sigmoid(log_odds)
        gradient *= (share / tl.where(total == 0, 1.0, total))[:, None]
        tl.store(log_sums + token, positive + loss - correction, mask=is_place)
    tl.store(losses + token, loss, mask=is_place)
    tl.store(shares + token, share, mask=is_place)
    if grad_hidden is not None:
        embedding = tl.load(of_target, mask=is_target, other=0.0).to(tl.float32)
        tl.store(grad_hidden + own, gradient - share[:, None] * embedding, mask=is_own)


@triton.jit(do_not_specialize=["n_tokens", "n_items"])
def find_runs_kernel(
    hidden,
    shares,
    by_target,
    order,
    first,
    stop,
    sums_of_runs,
    n_tokens,
    n_items,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Find where each target begins and stops among tokens sorted by it.

    Where all the tokens of a run of ``RUN`` have one target, their gradient of it is summed.
    """
    begin = tl.program_id(0) * RUN
    place = begin + tl.arange(0, RUN)
    is_place = place < n_tokens
    target = tl.load(by_target + place, mask=is_place, other=-1)
    before = tl.load(by_target + place - 1, mask=is_place & (place > 0), other=-1)
    after = tl.load(by_target + place + 1, mask=place + 1 < n_tokens, other=-1)
    is_item = (target >= 0) & (target < n_items)
    tl.store(first + target, place, mask=is_item & (target != before))
    tl.store(stop + target, place + 1, mask=is_item & (target != after))
    if begin + RUN > n_tokens:
        return
    if tl.load(by_target + begin) != tl.load(by_target + begin + RUN - 1):
        return
    columns = tl.arange(0, BLOCK_D)
    gradient = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for start in range(0, RUN, ROWS):
        row = start + tl.arange(0, ROWS)
        token = tl.load(order + begin + row, mask=row < RUN, other=0)
        share = tl.load(shares + token, mask=row < RUN, other=0.0)
        state = load_rows(hidden, token, row < RUN, 0, D, BLOCK_D)
        gradient -= share[:, None] * state.to(tl.float32)
    at = tl.program_id(0).to(tl.int64) * D + columns
    tl.store(sums_of_runs + at, tl.sum(gradient, axis=0), mask=columns < D)


@triton.jit(do_not_specialize=[*DRAWN, "n_pieces"])
def gather_pieces_kernel(
    hidden,
    table,
    targets,
    log_sums,
    offsets,
    coins,
    thresholds,
    aliases,
    log_chances,
    log_rests,
    n_tokens,
    n_items,
    n_negatives,
    coin_step,
    a,
    a_share,
    b,
    b_share,
    c,
    c_share,
    cells,
    piece_starts,
    pieces_by_length,
    sums_of_pieces,
    n_pieces,
    BITS: tl.constexpr,
    STEPS: tl.constexpr,
    D: tl.constexpr,
    BINARY: tl.constexpr,
    CORRECTED: tl.constexpr,
    ROWS: tl.constexpr,
    PARTNERS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Some pieces sum the gradient of their alias over the tokens whose coins chose it."""
    nth = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_piece = nth < n_pieces
    piece = tl.load(pieces_by_length + nth, mask=is_piece, other=0)
    start = tl.load(piece_starts + piece, mask=is_piece, other=0)
    length = tl.load(piece_starts + piece + 1, mask=is_piece, other=0) - start
    cell = tl.load(cells + start, mask=is_piece, other=0)
    item = tl.load(aliases + cell, mask=is_piece, other=0)
    key = load_rows(table, item, is_piece, 0, D, BLOCK_D).to(tl.float32)
    gradient = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for of_piece in range(0, tl.max(length)):
        is_cell = of_piece < length
        cell = tl.load(cells + start + of_piece, mask=is_cell, other=0)
        gradient = _gather(
            gradient,
            key,
            _relabel(cell, a, a_share, b, b_share, c, c_share, n_items, True, BITS),
            is_cell,
            cell,
            item,
            hidden,
            targets,
            log_sums,
            offsets,
            coins,
            thresholds,
            log_chances,
            n_tokens,
            n_items,
            n_negatives,
            coin_step,
            False,
            STEPS,
            D,
            BINARY,
            CORRECTED,
            PARTNERS,
        )
    columns = tl.arange(0, BLOCK_D)
    at = piece.to(tl.int64)[:, None] * D + columns[None, :]
    tl.store(sums_of_pieces + at, gradient, mask=is_piece[:, None] & (columns < D)[None, :])


@triton.jit(do_not_specialize=DRAWN)
def gather_items_kernel(
    hidden,
    table,
    targets,
    log_sums,
    offsets,
    coins,
    thresholds,
    aliases,
    log_chances,
    log_rests,
    n_tokens,
    n_items,
    n_negatives,
    coin_step,
    a,
    a_share,
    b,
    b_share,
    c,
    c_share,
    pieces_of_item,
    sums_of_pieces,
    shares,
    order,
    first,
    stop,
    sums_of_runs,
    scale,
    grad_table,
    BITS: tl.constexpr,
    STEPS: tl.constexpr,
    D: tl.constexpr,
    BINARY: tl.constexpr,
    CORRECTED: tl.constexpr,
    ROWS: tl.constexpr,
    PARTNERS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Some cells sum the gradient of their items: over who drew them and whose target they are."""
    cell = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_cell = cell < n_items
    cell = tl.where(is_cell, cell, 0)
    item = _relabel(cell, a, a_share, b, b_share, c, c_share, n_items, False, BITS)
    columns = tl.arange(0, BLOCK_D)
    row = item.to(tl.int64)[:, None] * D + columns[None, :]
    is_row = is_cell[:, None] & (columns < D)[None, :]
    key = tl.load(table + row, mask=is_row, other=0.0).to(tl.float32)
    gradient = tl.zeros([ROWS, BLOCK_D], tl.float32)
    gradient = _gather(
        gradient,
        key,
        cell,
        is_cell,
        item,
        item,
        hidden,
        targets,
        log_sums,
        offsets,
        coins,
        thresholds,
        log_chances,
        n_tokens,
        n_items,
        n_negatives,
        coin_step,
        True,
        STEPS,
        D,
        BINARY,
        CORRECTED,
        PARTNERS,
    )
    if sums_of_pieces is not None:
        begin = tl.load(pieces_of_item + item, mask=is_cell, other=0)
        end = tl.load(pieces_of_item + item + 1, mask=is_cell, other=0)
        gradient = _add_rows(gradient, sums_of_pieces, begin, end, D, PARTNERS)

    # The whole runs between the first and the last token of a target have their sums; what is left
    # are less than two runs.
    begin = tl.load(first + item, mask=is_cell, other=0)
    end = tl.load(stop + item, mask=is_cell, other=0)
    first_run, stop_run = (begin + RUN - 1) // RUN, end // RUN
    has_runs = first_run < stop_run
    gradient = _add_rows(gradient, sums_of_runs, first_run, stop_run, D, PARTNERS)
    n_head = tl.where(has_runs, first_run * RUN, end) - begin
    n_left = n_head + tl.where(has_runs, end - stop_run * RUN, 0)
    for start in range(0, tl.max(n_left), PARTNERS):
        nth = start + tl.arange(0, PARTNERS)[None, :]
        is_left = nth < n_left[:, None]
        place = begin[:, None] + nth
        place = tl.where(
            nth < n_head[:, None], place, place + ((stop_run - first_run) * RUN)[:, None]
        )
        token = tl.load(order + place, mask=is_left, other=0)
        share = tl.load(shares + token, mask=is_left, other=0.0)
        states = _load_rows(hidden, token, is_left, D, BLOCK_D)
        gradient -= tl.sum(share[:, :, None] * states, axis=1)
    gradient *= tl.load(scale)
    tl.store(grad_table + row, cast(gradient, grad_table.dtype.element_ty), mask=is_row)


@triton.jit
def _gather(
    gradient,
    key,
    cell,
    is_cell,
    owner,
    item,
    hidden,
    targets,
    log_sums,
    offsets,
    coins,
    thresholds,
    log_chances,
    n_tokens,
    n_items,
    n_negatives,
    coin_step,
    OWN: tl.constexpr,
    STEPS: tl.constexpr,
    D: tl.constexpr,
    BINARY: tl.constexpr,
    CORRECTED: tl.constexpr,
    PARTNERS: tl.constexpr,
):
    """Add to ``gradient``, [ROWS, BLOCK_D], that of each cell's item over the tokens that drew it.

    Where there are coins, tokens count whose coin chose the cell's ``owner``, which is the item,
    or, without ``OWN``, its alias, which then is. As offsets increase, the slots in which a token
    of a segment drew the cell lie side by side, the first after the last.
    """
    BLOCK_D: tl.constexpr = gradient.shape[1]
    if coins is not None:
        threshold = tl.load(thresholds + owner, mask=is_cell, other=0)
        if CORRECTED:
            log_chance = tl.load(log_chances + item, mask=is_cell, other=0.0)
    for begin in range(0, n_tokens, n_items):
        length = tl.minimum(n_items, n_tokens - begin)
        # The token in place i drew the cell in slots of the offset (cell - i) mod n_items.
        wraps = cell < length
        least = tl.where(wraps, cell - length + n_items, cell - length)
        first = _count_up_to(offsets, least, n_negatives, STEPS)
        n_slots = _count_up_to(offsets, cell, n_negatives, STEPS) - first
        n_slots += tl.where(wraps, n_negatives, 0)
        n_slots = tl.where(is_cell, n_slots, 0)
        for start in range(0, tl.max(n_slots), PARTNERS):
            nth = start + tl.arange(0, PARTNERS)[None, :]
            is_valid = nth < n_slots[:, None]
            slot = first[:, None] + nth
            slot = tl.where(slot < n_negatives, slot, slot - n_negatives)
            place = cell[:, None] - tl.load(offsets + slot, mask=is_valid, other=0)
            place = tl.where(place < 0, place + n_items, place)
            if coins is not None:
                coin = tl.load(coins + slot, mask=is_valid, other=0)
                coin = _toss(coin, owner[:, None], coin_step)
                is_own = coin <= threshold[:, None]
                is_valid = is_valid & (is_own if OWN else ~is_own)
            token = begin + place
            queries = _load_rows(hidden, token, is_valid, D, BLOCK_D)
            target = tl.load(targets + token, mask=is_valid, other=-1)
            is_valid = is_valid & (target != item[:, None])
            logits = tl.sum(queries * key[:, None, :], axis=2)
            if BINARY:
                factors = sigmoid(logits)
            else:
                if CORRECTED and coins is not None:
                    logits -= log_chance[:, None]
                log_sum = tl.load(log_sums + token, mask=is_valid, other=0.0)
                factors = tl.exp2((logits - log_sum) * LOG2_E)
            factors = tl.where(is_valid, factors, 0.0)
            gradient += tl.sum(factors[:, :, None] * queries, axis=1)
        offsets += n_negatives
        if coins is not None:
            coins += n_negatives
    return gradient


@triton.jit
def _count_up_to(offsets, bound, n_offsets, STEPS: tl.constexpr):
    """Return how many of the increasing offsets are at most ``bound``, by binary search."""
    low = tl.zeros_like(bound)
    high = low + n_offsets
    for _ in range(STEPS):
        middle = (low + high) // 2
        is_open = low < high
        is_within = is_open & (tl.load(offsets + middle, mask=is_open, other=0) <= bound)
        low = tl.where(is_within, middle + 1, low)
        high = tl.where(is_open & ~is_within, middle, high)
    return low


@triton.jit
def _add_rows(gradient, matrix, begin, end, D: tl.constexpr, PARTNERS: tl.constexpr):
    """Add to each row of ``gradient`` the rows of a matrix from its ``begin`` to its ``end``."""
    BLOCK_D: tl.constexpr = gradient.shape[1]
    for start in range(0, tl.max(end - begin), PARTNERS):
        row = begin[:, None] + start + tl.arange(0, PARTNERS)[None, :]
        gradient += tl.sum(_load_rows(matrix, row, row < end[:, None], D, BLOCK_D), axis=1)
    return gradient


@triton.jit
def _load_rows(matrix, rows, is_row, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return ``matrix[rows]`` in float32, [..., BLOCK_D], for rows of two dimensions."""
    columns = tl.arange(0, BLOCK_D)
    pointers = matrix + rows.to(tl.int64)[:, :, None] * D + columns[None, None, :]
    mask = is_row[:, :, None] & (columns < D)[None, None, :]
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _relabel(
    number,
    a,
    a_share,
    b,
    b_share,
    c,
    c_share,
    n_items,
    INVERSE: tl.constexpr,
    BITS: tl.constexpr,
):
    """Return the item of each cell, or the cell of each item, as ``Draw.relabel``."""
    last = n_items - (1 << BITS)
    number = _fold(_product(number, a, a_share, n_items), last if INVERSE else 0, BITS)
    number = _fold(_product(number, b, b_share, n_items), 0 if INVERSE else last, BITS)
    return _product(number, c, c_share, n_items)


@triton.jit
def _fold(number, begin, BITS: tl.constexpr):
    shifted = number - begin
    HALF: tl.constexpr = max(1, (BITS + 1) // 2)
    folded = shifted ^ (shifted >> HALF)
    return tl.where((shifted >= 0) & (shifted < (1 << BITS)), folded + begin, number)


@triton.jit
def _product(number, multiplier, share, n_items):
    """Return (number · multiplier) mod n_items, exactly, for a number below n_items (Shoup).

    With share = ⌊multiplier · 2^32 / n_items⌋, ⌊number · share / 2^32⌋ is what the division gives,
    or less by one. What is left fits into 32 bits, as n_items is below 2^31.
    """
    number = number.to(tl.uint32)
    n_items = n_items.to(tl.uint32)
    times = tl.umulhi(number, share.to(tl.uint32, bitcast=True))
    product = tl.mul(number, multiplier.to(tl.uint32), sanitize_overflow=False)
    left = tl.sub(product, tl.mul(times, n_items, sanitize_overflow=False), sanitize_overflow=False)
    return tl.where(left >= n_items, left - n_items, left).to(tl.int32)


@triton.jit
def _toss(coin, owner, coin_step):
    """Return the coin of a draw of the cell of ``owner``."""
    grown = tl.mul(owner, coin_step, sanitize_overflow=False)
    return tl.add(grown, coin, sanitize_overflow=False) & COIN_MASK
