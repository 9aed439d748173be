"""Losses over negatives of each token's own, drawn where they are needed; see ``losses.sampling``.

Tokens gather the embeddings of their negatives; then, as a draw can be inverted, cells gather the
hidden states of the tokens that drew them. So each row of each gradient is summed in registers and
stored once, in an order that never changes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sce_pipeline.losses.kernels.common import cdiv, launch, padded
from sce_pipeline.losses.kernels.sampled_passes import (
    RUN,
    find_runs_kernel,
    forward_kernel,
    gather_items_kernel,
    gather_pieces_kernel,
)
from sce_pipeline.losses.sampling import Draw, Popularity


class Tile(NamedTuple):
    """How a kernel is cut: rows of a program, partners that all of them meet at once, warps."""

    rows: int
    partners: int
    num_warps: int


def tile_for(matrix: Tensor) -> Tile:
    """Return the tile of a kernel that gathers rows of ``matrix``.

    Each thread loads 16 bytes at a time, and the threads of a warp hold whole rows, so that only
    the sums over d go from thread to thread, and no warp waits for another.
    """
    bytes_of_row = _block_d(matrix) * matrix.element_size()
    rows = max(1, 512 // bytes_of_row)
    partners = min(8, 32 // rows) // max(1, bytes_of_row // 512)
    return Tile(rows, max(2, partners), num_warps=1)


def forward(
    hidden: Tensor,
    item_embeddings: Tensor,
    targets: Tensor,
    draw: Draw,
    popularity: Popularity | None,
    *,
    corrected: bool,
    beta: float | None,
    with_gradient: bool,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Return the loss of each token and what the gradients need; see ``losses.per_token``.

    Returns:
        The losses, float32 [tokens]; the gradient of each in its hidden state, float32 [tokens, d];
        minus that in the target's logit, float32 [tokens]; and, for cross-entropy, the logsumexp of
        all logits less what a token's correction adds to those of its negatives, float32 [tokens].
    """
    n_tokens, d = hidden.shape
    tile = tile or tile_for(item_embeddings)
    losses = hidden.new_empty(n_tokens, dtype=torch.float32)
    shares, log_sums = torch.empty_like(losses), torch.empty_like(losses)
    grad_hidden = torch.empty_like(hidden, dtype=torch.float32) if with_gradient else None
    n_segments, n_negatives = draw.offsets.shape
    longest = min(n_tokens, draw.n_items)
    launch(
        forward_kernel,
        (cdiv(longest, tile.rows) * n_segments,),
        hidden,
        item_embeddings,
        targets,
        losses,
        grad_hidden,
        shares,
        log_sums,
        1.0 if beta is None else beta,
        *_tables(draw, popularity),
        n_tokens,
        draw.n_items,
        n_negatives,
        draw.coin_step,
        *_relabelling(draw.multipliers, draw.n_items),
        BITS=draw.n_items.bit_length() - 1,
        D=d,
        BINARY=beta is not None,
        CORRECTED=corrected,
        ROWS=tile.rows,
        SLOTS=tile.partners,
        BLOCK_D=_block_d(hidden),
        num_warps=tile.num_warps,
    )
    return losses, grad_hidden, shares, log_sums


def backward(
    scale: Tensor,
    hidden: Tensor,
    item_embeddings: Tensor,
    targets: Tensor,
    draw: Draw,
    popularity: Popularity | None,
    shares: Tensor,
    log_sums: Tensor,
    *,
    corrected: bool,
    binary: bool,
    tile: Tile | None = None,
) -> Tensor:
    """Return the gradient of the table, in its dtype, of the sum of losses times ``scale``."""
    n_tokens, d = hidden.shape
    n_items = draw.n_items
    block_d = _block_d(hidden)
    tile = tile or tile_for(hidden)
    by_target, order = targets.int().sort(stable=True)
    first, stop = targets.new_zeros(2, n_items, dtype=torch.int32)
    sums_of_runs = shares.new_empty(n_tokens // RUN.value, d)
    launch(
        find_runs_kernel,
        (cdiv(n_tokens, RUN.value),),
        hidden,
        shares,
        by_target,
        order,
        first,
        stop,
        sums_of_runs,
        n_tokens,
        n_items,
        D=d,
        ROWS=max(1, 512 // block_d),
        BLOCK_D=block_d,
        num_warps=1,
    )
    arguments = (
        hidden,
        item_embeddings,
        targets,
        log_sums,
        *_tables(draw, popularity),
        n_tokens,
        n_items,
        draw.n_negatives,
        draw.coin_step,
    )
    constants = {
        "BITS": n_items.bit_length() - 1,
        "STEPS": draw.n_negatives.bit_length(),
        "D": d,
        "BINARY": binary,
        "CORRECTED": corrected,
        "ROWS": tile.rows,
        "PARTNERS": tile.partners,
        "BLOCK_D": block_d,
        "num_warps": tile.num_warps,
    }
    sums_of_pieces = pieces_of_item = None
    if popularity is not None:
        n_pieces = len(popularity.pieces_by_length)
        pieces_of_item = popularity.pieces_of_item
        sums_of_pieces = shares.new_empty(n_pieces, d)
        first_inverse, second_inverse, third_inverse = (
            pow(multiplier, -1, n_items) for multiplier in draw.multipliers
        )
        launch(
            gather_pieces_kernel,
            (max(1, cdiv(n_pieces, tile.rows)),),
            *arguments,
            *_relabelling((third_inverse, second_inverse, first_inverse), n_items),
            popularity.cells,
            popularity.piece_starts,
            popularity.pieces_by_length,
            sums_of_pieces,
            n_pieces,
            **constants,
        )
    grad_table = torch.empty_like(item_embeddings)
    launch(
        gather_items_kernel,
        (cdiv(n_items, tile.rows),),
        *arguments,
        *_relabelling(draw.multipliers, n_items),
        pieces_of_item,
        sums_of_pieces,
        shares,
        order,
        first,
        stop,
        sums_of_runs,
        scale,
        grad_table,
        **constants,
    )
    return grad_table


def _tables(draw: Draw, popularity: Popularity | None) -> tuple[Tensor | None, ...]:
    if popularity is None:
        return draw.offsets, None, None, None, None, None
    return (
        draw.offsets,
        draw.coins,
        popularity.thresholds,
        popularity.aliases,
        popularity.log_chances,
        popularity.log_rests,
    )


def _block_d(matrix: Tensor) -> int:
    return padded(matrix.shape[1])


def _relabelling(multipliers: tuple[int, int, int], n_items: int) -> list[int]:
    """Return each multiplier and its share of ``n_items``, as bits of int32; see ``_product``."""
    quotients = ((multiplier << 32) // n_items for multiplier in multipliers)
    signed = (quotient - ((quotient >> 31) << 32) for quotient in quotients)
    return [number for pair in zip(multipliers, signed, strict=True) for number in pair]
