"""Launches the two passes of exact cross-entropy: over the items, and over the tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sce_pipeline.losses.kernels.cce_passes import (
    hidden_kernel,
    join_hidden_kernel,
    join_table_kernel,
    row_norms_kernel,
    table_kernel,
)
from sce_pipeline.losses.kernels.common import cdiv, launch, padded
from sce_pipeline.losses.shard_passes import Parts

MOST_SHARES = 16
"""Into which a block is split; their sums are joined one after the other."""

LARGEST_BOX = 256
"""Elements along a side of what the copy engine fetches at once."""


class Terms(NamedTuple):
    """What enters the logits and the loss beside the inner products.

    Attributes:
        scale: Factor τ of the inner products.
        smoothing: Label smoothing ε.
        z_loss: Factor λ of lse².
        skip_mass: Softmax mass a token may lose to skipped tiles.
        bias: Addend β of each item's logit, float32 [n_items], or ``None`` for 0.
        token_scale: Factor u of each token, float32 [tokens], or ``None`` for 1.
        item_scale: Factor v of each item, float32 [n_items]; given where ``token_scale`` is.
        mean_item: Mean of v_c·w_c, float32 [d]; given where ε > 0.
        sum_token: Sum of u_i·x_i, float32 [d]; given where ε > 0.
    """

    scale: float
    smoothing: float
    z_loss: float
    skip_mass: float
    bias: Tensor | None
    token_scale: Tensor | None
    item_scale: Tensor | None
    mean_item: Tensor | None
    sum_token: Tensor | None


class Tiles(NamedTuple):
    """How a pass is launched.

    Attributes:
        own: Rows of a program.
        other: Rows that they meet at a time.
        warps: Warps of a program.
        stages: Tiles of other rows on their way at a time.
        registers: Most registers of a thread, or ``None`` for as many as it takes.
        copied: Whether the copy engine fetches the tiles, where it can.
    """

    own: int
    other: int
    warps: int
    stages: int
    registers: int | None = None
    copied: bool = True


def tiles(dtype: torch.dtype, d: int, *, table_pass: bool) -> Tiles:
    """Return the sizes that ran fastest on an H100."""
    size = padded(d)
    if dtype == torch.float32:
        if size <= 64:
            return Tiles(64, 32, 4, 3)
        return Tiles(64, 32, 8, 1) if size <= 256 else Tiles(32, 16, 8, 1)
    if size <= 64 and dtype == torch.bfloat16:
        return Tiles(64, 128, 4, 3, 168)
    if size <= 128:
        return Tiles(64, 64, 4, 3)
    if size == 256:
        return Tiles(128, 64, 8, 3, copied=False) if table_pass else Tiles(64, 64, 4, 3)
    return Tiles(64, 32, 8, 2)


class Schedule(NamedTuple):
    """Which programs take a block whole and which a share of one.

    Whole blocks go in multiples of the multiprocessors; each of the others is split into shares
    that together keep all of them busy, and whose sums are joined afterwards, in a fixed order.
    """

    n_blocks: int
    n_whole: int
    n_shares: int
    tiles_per_share: int

    @property
    def n_split(self) -> int:
        """Blocks that are split."""
        return self.n_blocks - self.n_whole

    @property
    def n_programs(self) -> int:
        """Programs to launch."""
        return self.n_whole + self.n_split * self.n_shares


def schedule(n_own: int, n_other: int, sizes: Tiles, device: torch.device) -> Schedule:
    """Share out ``n_own`` rows, each of which meets ``n_other``."""
    n_blocks, n_tiles = cdiv(n_own, sizes.own), cdiv(n_other, sizes.other)
    processors = _processors(device)
    n_whole = n_blocks // processors * processors
    n_shares = 1
    if n_blocks > n_whole:
        n_shares = min(processors // (n_blocks - n_whole), n_tiles, MOST_SHARES)
    if n_shares == 1:
        n_whole = n_blocks
    tiles_per_share = cdiv(n_tiles, n_shares)
    return Schedule(n_blocks, n_whole, cdiv(n_tiles, tiles_per_share), tiles_per_share)


def _processors(device: torch.device) -> int:
    if device.type == "cpu":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def row_norms(rows: Tensor) -> Tensor:
    """Return the Euclidean norm of each row, float32 [n]."""
    n, d = rows.shape
    norms = torch.empty(n, dtype=torch.float32, device=rows.device)
    block = max(1, 8192 // padded(d))
    launch(
        row_norms_kernel,
        (cdiv(n, block),),
        rows,
        norms,
        n,
        D=d,
        BLOCK=block,
        BLOCK_D=padded(d),
    )
    return norms


class Sums(NamedTuple):
    """What the pass over the items leaves for the backward.

    Attributes:
        lse: Logsumexp of each token's logits in base 2, float32, padded with infinity.
        target_weights: Derivative of each loss by its target's logit, float32 [tokens].
        grad: Derivative of each loss by its hidden state, [tokens, d], or ``None``.
    """

    lse: Tensor
    target_weights: Tensor
    grad: Tensor | None


def hidden_pass(
    x: Tensor, w: Tensor, targets: Tensor, terms: Terms, *, grad: bool
) -> tuple[Tensor, Sums]:
    """Pass over all items for the tokens' losses, float32 [tokens], and their gradients.

    Args:
        x: Hidden states, contiguous [tokens, d], at least one.
        w: Item embeddings, contiguous [n_items, d], of the same dtype, at least one.
        targets: int64 [tokens]; out of range, the loss is NaN.
        terms: The rest of the logits and the loss.
        grad: Whether to compute the gradient of the hidden states.
    """
    losses = torch.empty(len(x), dtype=torch.float32, device=x.device)
    sums = Sums(_no_sums(x), torch.empty_like(losses), torch.empty_like(x) if grad else None)
    _pass_over_items(x, w, targets, terms, losses, sums, partial=False)
    return losses, sums


def hidden_parts(x: Tensor, w: Tensor, targets: Tensor, terms: Terms, *, grad: bool) -> Parts:
    """Pass over some of the items for what they contribute to each token's softmax.

    Args:
        x: As in ``hidden_pass``, and likewise ``w``.
        w: The items' embeddings.
        targets: Rows of ``w``, -1 for an item that is not among them, int64 [tokens].
        terms: The rest of the logits.
        grad: Whether to compute the means.
    """
    terms = terms._replace(smoothing=0.0, z_loss=0.0)
    others = torch.empty(len(x), dtype=torch.float32, device=x.device)
    mean = torch.empty_like(x, dtype=torch.float32) if grad else None
    parts = Parts(others, torch.empty_like(others), mean)
    _pass_over_items(x, w, targets, terms, others[:0], Sums(*parts), partial=True)
    return parts


def joined_sums(x: Tensor, log_sum: Tensor, target_weights: Tensor) -> Sums:
    """Return what ``table_pass`` needs from logsumexps of base 2, [tokens], joined elsewhere."""
    lse = _no_sums(x)
    lse[: len(x)] = log_sum
    return Sums(lse, target_weights, None)


def _no_sums(x: Tensor) -> Tensor:
    # The table pass reads whole tiles: a token that is none has no softmax anywhere.
    n_tokens, d = x.shape
    other = tiles(x.dtype, d, table_pass=True).other
    n_padded = cdiv(n_tokens, other) * other
    return torch.full((n_padded,), torch.inf, dtype=torch.float32, device=x.device)


def _pass_over_items(
    x: Tensor,
    w: Tensor,
    targets: Tensor,
    terms: Terms,
    losses: Tensor,
    sums: Sums,
    *,
    partial: bool,
) -> None:
    """Fill ``losses`` and ``sums``; where ``partial``, ``sums`` with the fields of ``Parts``."""
    (n_tokens, d), n_items = x.shape, len(w)
    grad = sums.grad is not None
    sizes = tiles(x.dtype, d, table_pass=False)
    plan = schedule(n_tokens, n_items, sizes, x.device)
    empty = torch.empty(0, dtype=torch.float32, device=x.device)
    new = empty.new_empty
    n_parts = plan.n_split * plan.n_shares if plan.n_shares > 1 else 0
    parts = new(n_parts, sizes.own, padded(d) if grad else 0)
    part_sums, part_maxima = new(n_parts, sizes.own), new(n_parts, sizes.own)
    part_safe = torch.empty(n_parts, dtype=torch.int32, device=x.device)
    fast = x.dtype == torch.bfloat16
    bounds = _logit_bounds(w, terms) if fast else empty
    has_descriptor = _has_descriptor(w, sizes)
    options = dict(
        D=d,
        BLOCK=sizes.own,
        BLOCK_D=padded(d),
        GRAD=grad,
        FAST=fast,
        P_SCALE=_p_scale(x.dtype, terms),
        PARTIAL=partial,
        **_flags(terms),
    )
    arguments = (
        x,
        w,
        targets,
        *(empty if part is None else part for part in (terms.bias, terms.token_scale)),
        *(empty if part is None else part for part in (terms.item_scale, terms.mean_item)),
        bounds,
        _mean_bias(terms, empty),
        losses,
        sums.lse,
        sums.target_weights,
        x if sums.grad is None else sums.grad,
        parts,
        part_sums,
        part_maxima,
        part_safe,
        n_tokens,
        n_items,
        plan.n_whole,
        plan.n_shares,
        terms.scale,
        terms.smoothing,
        terms.z_loss,
    )
    launch(
        hidden_kernel,
        (plan.n_programs,),
        TensorDescriptor.from_tensor(w, [sizes.other, padded(d)]) if has_descriptor else w,
        plan.tiles_per_share,
        terms.skip_mass / cdiv(n_items, sizes.other),
        *arguments,
        TILE=sizes.other,
        DESCRIPTOR=has_descriptor,
        SKIP=terms.skip_mass > 0,
        **options,
        **_launch_options(sizes),
    )
    if n_parts:
        launch(join_hidden_kernel, (plan.n_split,), *arguments, **options, num_warps=sizes.warps)


class TokensByBlock(NamedTuple):
    """Which tokens a block of items is the target of.

    Attributes:
        order: The tokens, those of a block one after the other, int64 [tokens].
        first: Where those of each block begin there, and where the last end, int32 [blocks + 1].
    """

    order: Tensor
    first: Tensor


def tokens_by_block(x: Tensor, w: Tensor, targets: Tensor) -> TokensByBlock:
    """Return what ``table_pass`` needs of the targets.

    By itself, so that what sorting takes has gone when there is a gradient of the table.
    """
    size = tiles(x.dtype, x.shape[1], table_pass=True).own
    n_blocks = cdiv(len(w), size)
    # A short integer is sorted in half the time.
    number = torch.int16 if n_blocks < 2**15 else torch.int32
    blocks, order = (targets // size).to(number).sort(stable=True)
    every_block = torch.arange(n_blocks + 1, dtype=number, device=x.device)
    return TokensByBlock(order, torch.searchsorted(blocks, every_block, out_int32=True))


def table_pass(
    x: Tensor,
    w: Tensor,
    targets: Tensor,
    tokens: TokensByBlock,
    terms: Terms,
    sums: Sums,
    upstream: Tensor,
    grad: Tensor,
    *,
    grad_bias: bool,
) -> Tensor | None:
    """Pass over all tokens; fill in the gradient of the table and return that of the bias, if any.

    They are those of ``upstream`` times the mean loss.

    Args:
        x: As in ``hidden_pass``, and likewise ``w``, ``targets`` and ``terms``.
        w: Item embeddings.
        targets: int64 [tokens].
        tokens: What ``tokens_by_block`` made of them.
        terms: The rest of the logits and the loss.
        sums: What ``hidden_pass`` left.
        upstream: Derivative of what is minimised by the mean loss, float32, one element.
        grad: Where the table's gradient goes, contiguous [n_items, d].
        grad_bias: Whether to compute the gradient of the bias too.
    """
    (n_tokens, d), n_items = x.shape, len(w)
    sizes = tiles(x.dtype, d, table_pass=True)
    plan = schedule(n_items, n_tokens, sizes, x.device)
    empty = torch.empty(0, dtype=torch.float32, device=x.device)
    new = empty.new_empty
    n_parts = plan.n_split * plan.n_shares if plan.n_shares > 1 else 0
    parts, bias_parts = new(n_parts, sizes.own, padded(d)), new(n_parts, sizes.own)
    of_bias = new(n_items) if grad_bias else None
    has_descriptor = _has_descriptor(x, sizes)
    options = dict(
        D=d,
        BLOCK=sizes.own,
        BLOCK_D=padded(d),
        EXACT=x.dtype == torch.float32,
        P_SCALE=_p_scale(x.dtype, terms),
        GRAD_BIAS=grad_bias,
        **_flags(terms),
    )
    arguments = (
        x,
        w,
        targets,
        *(empty if part is None else part for part in (terms.bias, terms.token_scale)),
        *(empty if part is None else part for part in (terms.item_scale, terms.sum_token)),
        sums.lse,
        sums.target_weights,
        *tokens,
        upstream,
        grad,
        empty if of_bias is None else of_bias,
        parts,
        bias_parts,
        n_tokens,
        n_items,
        plan.n_whole,
        plan.n_shares,
        terms.scale,
        terms.smoothing,
        terms.z_loss,
    )
    launch(
        table_kernel,
        (plan.n_programs,),
        TensorDescriptor.from_tensor(x, [sizes.other, padded(d)]) if has_descriptor else x,
        plan.tiles_per_share,
        terms.skip_mass / plan.n_blocks,
        *arguments,
        TILE=sizes.other,
        DESCRIPTOR=has_descriptor,
        SKIP=terms.skip_mass > 0,
        **options,
        **_launch_options(sizes),
    )
    if n_parts:
        launch(join_table_kernel, (plan.n_split,), *arguments, **options, num_warps=sizes.warps)
    return of_bias


def _flags(terms: Terms) -> dict[str, bool]:
    return {
        "HAS_BIAS": terms.bias is not None,
        "NORMALIZED": terms.item_scale is not None,
        "SMOOTHED": terms.smoothing > 0,
        "Z_LOSS": terms.z_loss > 0,
    }


def _launch_options(sizes: Tiles) -> dict[str, int]:
    options = {"num_warps": sizes.warps, "num_stages": sizes.stages}
    return options if sizes.registers is None else {**options, "maxnreg": sizes.registers}


def _p_scale(dtype: torch.dtype, terms: Terms) -> float:
    """Return what lifts small probabilities into the range of the dtype they are rounded to."""
    if dtype != torch.float16:
        return 1.0
    # Normalised, probabilities are divided by norms, which may be small: room is left for that.
    return 2.0**14 if terms.item_scale is None else 2.0**7


def _has_descriptor(rows: Tensor, sizes: Tiles) -> bool:
    """Return whether the copy engine can fetch tiles of ``rows``."""
    return (
        sizes.copied
        and rows.shape[1] * rows.element_size() % 16 == 0
        and rows.data_ptr() % 16 == 0
        and padded(rows.shape[1]) <= LARGEST_BOX
        and rows.element_size() == 2
    )


def _logit_bounds(w: Tensor, terms: Terms) -> Tensor:
    """Return the largest norm of an item, 1 if normalised, and the extremes of the bias, if any."""
    norm = row_norms(w).max() if terms.item_scale is None else w.new_ones((), dtype=torch.float32)
    return norm if terms.bias is None else torch.stack([norm, *terms.bias.aminmax()])


def _mean_bias(terms: Terms, empty: Tensor) -> Tensor:
    return empty if terms.bias is None or not terms.smoothing else terms.bias.mean()[None]
