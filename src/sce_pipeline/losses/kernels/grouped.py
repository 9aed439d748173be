"""Losses over negatives that a group of tokens shares: the logits never leave the chip."""

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
from sce_pipeline.losses.kernels.rows import cast, load_rows

if TYPE_CHECKING:
    from sce_pipeline.losses.grouped import Groups

LOG2_SCALE = tl.constexpr(14.0)
"""Probabilities enter products times 2**14, so that float16 holds the small ones as well."""

SCALE = tl.constexpr(2.0**14)

MIN_PROGRAMS = 1024
"""Where groups and chunks of negatives give fewer programs, several share the tokens of a group."""


class Tile(NamedTuple):
    """How a kernel is cut: tokens and negatives of a block, and Triton's options."""

    tokens: int
    negatives: int
    num_warps: int
    num_stages: int


# By the columns of a block. What is larger spills registers; float32 needs many for its three
# products of TF32.
FORWARD_TILES = {
    64: Tile(64, 64, 4, 1),
    128: Tile(64, 64, 8, 1),
    256: Tile(64, 64, 8, 2),
    512: Tile(32, 16, 8, 1),
}
FORWARD_TILES_OF_FLOAT32 = {
    64: Tile(64, 32, 4, 1),
    128: Tile(16, 32, 4, 1),
    256: Tile(16, 16, 4, 1),
    512: Tile(16, 16, 16, 1),
}
BACKWARD_TILES = {
    64: Tile(32, 64, 4, 1),
    128: Tile(64, 64, 8, 1),
    256: Tile(32, 64, 8, 1),
    512: Tile(32, 32, 8, 1),
}
BACKWARD_TILES_OF_FLOAT32 = {
    64: Tile(32, 64, 4, 1),
    128: Tile(16, 32, 4, 1),
    256: Tile(16, 16, 4, 1),
    512: Tile(16, 16, 16, 1),
}


def forward(
    hidden: Tensor,
    item_embeddings: Tensor,
    targets: Tensor,
    groups: Groups,
    *,
    beta: float | None,
    dtype: torch.dtype,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the loss of each token and what the gradients need; see ``losses.grouped``.

    Returns:
        In float32, the losses, [tokens]; the gradient of each in its hidden state, [tokens, d];
        minus that in the target's logit, [tokens]; and the logsumexp of the target's and the
        negatives' logits less the correction, [tokens], which only cross-entropy fills.
    """
    n_tokens, d = hidden.shape
    n_groups, n_negatives = groups.items.shape
    block_d = padded(d)
    tiles = FORWARD_TILES_OF_FLOAT32 if dtype == torch.float32 else FORWARD_TILES
    tile = tile or tiles[max(block_d, 64)]
    losses = hidden.new_empty(n_tokens, dtype=torch.float32)
    shares, log_sums = torch.empty_like(losses), torch.empty_like(losses)
    grad_hidden = torch.empty_like(hidden, dtype=torch.float32)
    # As many blocks as ragged groups may need, at most: nobody asks the device how many there are.
    launch(
        _forward,
        (n_tokens // tile.tokens + n_groups,),
        hidden,
        item_embeddings,
        targets,
        groups.items,
        *_tensor_or_number(groups.offsets),
        groups.log_weights,
        *_tensor_or_number(groups.log_masses),
        losses,
        grad_hidden,
        shares,
        log_sums,
        1.0 if beta is None else beta,
        n_tokens,
        n_groups,
        len(item_embeddings),
        n_negatives,
        D=d,
        BINARY=beta is not None,
        CORRECTED=groups.log_masses is not None,
        DTYPE=TRITON_DTYPES[dtype],
        BLOCK_T=tile.tokens,
        BLOCK_K=tile.negatives,
        BLOCK_D=block_d,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return losses, grad_hidden, shares, log_sums


def backward(
    scale: Tensor,
    hidden: Tensor,
    item_embeddings: Tensor,
    targets: Tensor,
    groups: Groups,
    shares: Tensor,
    log_sums: Tensor,
    *,
    beta: float | None,
    dtype: torch.dtype,
    tile: Tile | None = None,
) -> Tensor:
    """Return the gradient of the table, float32 [n_items, d], of the sum of losses times ``scale``.

    It is added up with atomics, in an order that changes from run to run.
    """
    n_tokens, d = hidden.shape
    n_groups, n_negatives = groups.items.shape
    block_d = padded(d)
    tiles = BACKWARD_TILES_OF_FLOAT32 if dtype == torch.float32 else BACKWARD_TILES
    tile = tile or tiles[max(block_d, 64)]
    grad_table = torch.zeros_like(item_embeddings, dtype=torch.float32)
    n_programs = n_groups * cdiv(n_negatives, tile.negatives)
    n_splits = min(cdiv(MIN_PROGRAMS, n_programs), cdiv(n_tokens, tile.tokens))
    launch(
        _backward,
        (n_programs, n_splits),
        scale,
        hidden,
        item_embeddings,
        targets,
        groups.items,
        *_tensor_or_number(groups.offsets),
        groups.log_weights,
        shares,
        log_sums,
        grad_table,
        n_tokens,
        len(item_embeddings),
        n_negatives,
        n_splits,
        D=d,
        BINARY=beta is not None,
        DTYPE=TRITON_DTYPES[dtype],
        BLOCK_T=tile.tokens,
        BLOCK_K=tile.negatives,
        BLOCK_D=block_d,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return grad_table


def _tensor_or_number(given: Tensor | float | None) -> tuple[Tensor | None, float]:
    """Return a pair of arguments, one of which a kernel reads."""
    if isinstance(given, Tensor):
        return given, 0
    return None, 0 if given is None else given


# Batches differ in their tokens and groups: neither may make Triton compile again.
@triton.jit(do_not_specialize=["n_tokens", "n_groups", "group_size", "log_mass"])
def _forward(
    hidden,
    table,
    targets,
    items,
    offsets,
    group_size,
    log_weights,
    log_masses,
    log_mass,
    losses,
    grad_hidden,
    shares,
    log_sums,
    beta,
    n_tokens,
    n_groups,
    n_items,
    n_negatives,
    D: tl.constexpr,
    BINARY: tl.constexpr,
    CORRECTED: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A block of tokens meets all negatives of its group, a chunk at a time."""
    group, first, end = _block_of(
        tl.program_id(0), offsets, group_size, n_tokens, n_groups, BLOCK_T
    )
    if first >= end:
        return
    token = first + tl.arange(0, BLOCK_T)
    is_token = token < end
    state = load_rows(hidden, token, is_token, 0, D, BLOCK_D)
    target = tl.load(targets + token, mask=is_token, other=0)
    is_item = (target >= 0) & (target < n_items)
    embedding = load_rows(table, target, is_token & is_item, 0, D, BLOCK_D)
    positive = tl.sum(state.to(tl.float32) * embedding.to(tl.float32), axis=1)
    positive = tl.where(is_item, positive, float("nan"))

    query, identity = cast(state, DTYPE), target.to(tl.int32)
    total, n_valid = tl.zeros([BLOCK_T], tl.float32), tl.zeros([BLOCK_T], tl.float32)
    largest = tl.full([BLOCK_T], float("-inf"), tl.float32)
    gradient = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for start in range(0, n_negatives, BLOCK_K):
        item, key, weight = _negatives(
            items, table, log_weights, group, start, n_negatives, D, DTYPE, BLOCK_K, BLOCK_D
        )
        logits = dot(query, tl.trans(key), tl.zeros([BLOCK_T, BLOCK_K], tl.float32))
        collides = item[None, :] == identity[:, None]
        logits = tl.where(collides, float("-inf"), logits + weight[None, :])
        if BINARY:
            total += tl.sum(softplus(logits), axis=1)
            factors = sigmoid(logits) * SCALE
        else:
            if CORRECTED:
                n_valid += tl.sum(tl.where(logits == float("-inf"), 0.0, 1.0), axis=1)
            largest, fade, factors = _softmax_step(largest, logits)
            total = total * fade + tl.sum(factors, axis=1)
            gradient *= fade[:, None]
        gradient = dot(cast(factors, DTYPE), key, gradient)

    if BINARY:
        loss, share = beta * softplus(-positive) + total, beta * sigmoid(-positive)
        factor = tl.full([BLOCK_T], 1.0 / SCALE, tl.float32)
    else:
        correction = tl.zeros([BLOCK_T], tl.float32)
        if CORRECTED:
            correction -= tl.log(tl.maximum(n_valid, 1.0))
            if log_masses is not None:
                correction += tl.load(log_masses + token, mask=is_token, other=0.0).to(tl.float32)
            else:
                correction += log_mass
        # Of the odds against the target, as logsumexp(all) - positive would cancel where it has
        # nearly all of the sum.
        log_odds = largest + (tl.log2(total) - LOG2_SCALE) * LN_2 + correction - positive
        loss, share = softplus(log_odds), sigmoid(log_odds)
        factor = share / tl.where(total == 0, 1.0, total)
        tl.store(log_sums + token, positive + loss - correction, mask=is_token)
    embedding = load_rows(table, target, is_token & is_item, 0, D, BLOCK_D)
    gradient = gradient * factor[:, None] - share[:, None] * embedding.to(tl.float32)
    columns = tl.arange(0, BLOCK_D)[None, :]
    own = grad_hidden + token[:, None] * D + columns
    tl.store(own, gradient, mask=is_token[:, None] & (columns < D))
    tl.store(losses + token, loss, mask=is_token)
    tl.store(shares + token, share, mask=is_token)


@triton.jit(do_not_specialize=["n_tokens", "n_splits", "group_size"])
def _backward(
    scale,
    hidden,
    table,
    targets,
    items,
    offsets,
    group_size,
    log_weights,
    shares,
    log_sums,
    grad_table,
    n_tokens,
    n_items,
    n_negatives,
    n_splits,
    D: tl.constexpr,
    BINARY: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A chunk of negatives meets the tokens of its group, every ``n_splits``-th block of them."""
    n_chunks = tl.cdiv(n_negatives, BLOCK_K)
    group, chunk = tl.program_id(0) // n_chunks, tl.program_id(0) % n_chunks
    begin, end = _tokens_of(group, offsets, group_size, n_tokens)
    begin += tl.program_id(1) * BLOCK_T
    if begin >= end:
        return
    factor = tl.load(scale)
    item, key, weight = _negatives(
        items, table, log_weights, group, chunk * BLOCK_K, n_negatives, D, DTYPE, BLOCK_K, BLOCK_D
    )
    gradient = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for first in range(begin, end, n_splits * BLOCK_T):
        token = first + tl.arange(0, BLOCK_T)
        is_token = token < end
        query = cast(load_rows(hidden, token, is_token, 0, D, BLOCK_D), DTYPE)
        target = tl.load(targets + token, mask=is_token, other=0).to(tl.int32)
        logits = dot(key, tl.trans(query), tl.zeros([BLOCK_K, BLOCK_T], tl.float32))
        collides = item[:, None] == target[None, :]
        logits = tl.where(collides, float("-inf"), logits + weight[:, None])
        if BINARY:
            factors = sigmoid(logits) * SCALE
        else:
            log_sum = tl.load(log_sums + token, mask=is_token, other=float("inf"))
            factors = tl.exp2(logits * LOG2_E - (log_sum * LOG2_E - LOG2_SCALE)[None, :])
        gradient = dot(cast(factors, DTYPE), query, gradient)
    _add_to_rows(grad_table, item.to(tl.int64), item >= 0, gradient * (factor / SCALE), D, BLOCK_D)

    if chunk == 0:
        for first in range(begin, end, n_splits * BLOCK_T):
            token = first + tl.arange(0, BLOCK_T)
            target = tl.load(targets + token, mask=token < end, other=-1)
            is_item = (target >= 0) & (target < n_items)
            share = tl.load(shares + token, mask=is_item, other=0.0)
            state = load_rows(hidden, token, is_item, 0, D, BLOCK_D).to(tl.float32)
            state *= (-factor * share)[:, None]
            _add_to_rows(grad_table, target, is_item, state, D, BLOCK_D)


@triton.jit
def _negatives(
    items,
    table,
    log_weights,
    group,
    start,
    n_negatives,
    D: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Return a chunk of a group's negatives: their items, embeddings and weights of logits.

    Where there is none, be it beyond the last, the item is -1 and the weight -inf.
    """
    lane = start + tl.arange(0, BLOCK_K)
    position = group.to(tl.int64) * n_negatives + lane
    item = tl.load(items + position, mask=lane < n_negatives, other=-1)
    key = cast(load_rows(table, item, item >= 0, 0, D, BLOCK_D), DTYPE)
    weight = tl.where(item >= 0, 0.0, float("-inf"))
    if log_weights is not None:
        weight += tl.load(log_weights + position, mask=lane < n_negatives, other=0.0)
    return item.to(tl.int32), key, weight


@triton.jit
def _add_to_rows(matrix, row, is_row, values, D: tl.constexpr, BLOCK_D: tl.constexpr):
    columns = tl.arange(0, BLOCK_D)[None, :]
    is_inside = is_row[:, None] & (columns < D)
    tl.atomic_add(matrix + row[:, None] * D + columns, values, mask=is_inside, sem="relaxed")


@triton.jit
def _softmax_step(largest, logits):
    """Return the new largest logit, what fades the sums so far, and the factors 2**14·p."""
    larger = tl.maximum(largest, tl.max(logits, axis=1))
    centre = tl.where(larger == float("-inf"), 0.0, larger)
    fade = tl.exp2((largest - centre) * LOG2_E)
    return larger, fade, tl.exp2(logits * LOG2_E - (centre * LOG2_E - LOG2_SCALE)[:, None])


@triton.jit
def _tokens_of(group, offsets, group_size, n_tokens):
    """Return the first token of a group and that after its last."""
    if offsets is not None:
        begin, end = tl.load(offsets + group), tl.load(offsets + group + 1)
    else:
        begin = group.to(tl.int64) * group_size
        end = begin + group_size
    return tl.minimum(begin, n_tokens), tl.minimum(end, n_tokens)


@triton.jit
def _block_of(block, offsets, group_size, n_tokens, n_groups, BLOCK_T: tl.constexpr):
    """Return the group of a block of tokens, the block's first token and that after the group's.

    The group is the last whose first block is ``block`` or comes before it.
    """
    low, high = 0 * block, n_groups - 1
    while low < high:
        middle = (low + high + 1) // 2
        begin, end = _tokens_of(middle, offsets, group_size, n_tokens)
        is_before = _first_block(middle, begin, BLOCK_T) <= block
        low = tl.where(is_before, middle, low)
        high = tl.where(is_before, high, middle - 1)
    begin, end = _tokens_of(low, offsets, group_size, n_tokens)
    return low, begin + (block - _first_block(low, begin, BLOCK_T)) * BLOCK_T, end


@triton.jit
def _first_block(group, begin, BLOCK_T: tl.constexpr):
    """Return the number of a group's first block, given that of its first token.

    From one group to the next it grows by at least what the tokens between them need, so that
    ragged groups are laid out without adding up their blocks.
    """
    return begin // BLOCK_T + group
