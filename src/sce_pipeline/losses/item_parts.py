"""Exact cross-entropy over items in parts: those of the ranks, and of each, ranges of rows.

Each rank passes over its own rows for everybody's tokens. For one token, that gives the logsumexp
of its items and their mean by softmax; what ranks exchange are the hidden states, those logsumexps
and, for the sum of their gradients, the means: nothing that grows with the catalogue.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd.function import once_differentiable

from sce_pipeline.collectives import gather_rows, sum_rows
from sce_pipeline.losses import shard_passes
from sce_pipeline.losses.base import at_least_float32, scaled
from sce_pipeline.losses.cast_table import CastTable
from sce_pipeline.losses.implementation import compute_dtype
from sce_pipeline.losses.shard_passes import LOG2_E, Parts


class Shard(NamedTuple):
    """Where this rank's items and tokens are among everybody's.

    Attributes:
        first_item: The item of this rank's first row.
        n_items: Items of all ranks together.
        counts: Tokens of each rank.
        group: The ranks that share the table; all there are where ``None``.
        alone: Whether there are no ranks, and nothing is exchanged.
    """

    first_item: int
    n_items: int
    counts: Sequence[int]
    group: dist.ProcessGroup | None = None
    alone: bool = False

    def gather(self, rows: Tensor) -> Tensor:
        """Return the rows of all ranks' tokens, given those of this one's."""
        return rows if self.alone else gather_rows(rows, self.counts, self.group)

    def gather_one(self, values: Tensor) -> Tensor:
        """Return each rank's ``values``, [ranks, ...]."""
        one = values[None]
        return one if self.alone else gather_rows(one, [1] * len(self.counts), self.group)

    def sum(self, rows: Tensor) -> Tensor:
        """Add up what the ranks have for all tokens, and return the sums of this rank's."""
        return rows if self.alone else sum_rows(rows, self.counts, self.group)


class Options(NamedTuple):
    """What is computed and by whom; the numbers are those of ``cut_cross_entropy``."""

    smoothing: float
    z_loss: float
    scale: float
    skip_mass: float
    triton: bool
    grad: bool


def cross_entropy_in_parts(
    hidden: Tensor,
    item_embeddings: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    shard: Shard,
    options: Options,
) -> Tensor:
    """Return the mean loss of ``sharded_cross_entropy``, whose arguments have been checked.

    Args:
        hidden: This rank's hidden states, floating [tokens, d].
        item_embeddings: This rank's rows of the live table, floating [rows, d].
        bias: Addend of each of its items' logits, float32 at least [rows]; gets no gradient.
        targets: The items to predict, among all there are, int64 [tokens].
        shard: Where these items and tokens are among everybody's.
        options: What is computed and by whom.
    """
    return _CrossEntropyInParts.apply(hidden, item_embeddings, bias, targets, shard, options)


class Joined(NamedTuple):
    """What follows from all ranks' items together for each token.

    Attributes:
        losses: [tokens].
        log_sum: Logsumexp of base 2 of the logits of all items.
        row_factors: Derivative of the loss by its lse, 1 + 2·z_loss·lse.
        target_weights: Derivative of the loss by its target's logit, but for the ε / n_items that
            label smoothing takes from every item's.
    """

    losses: Tensor
    log_sum: Tensor
    row_factors: Tensor
    target_weights: Tensor


def join(
    others: Tensor, of_target: Tensor, mean_logits: Tensor | None, smoothing: float, z_loss: float
) -> Joined:
    """Join what each rank has found for each token.

    Args:
        others: ``Parts.others`` of each rank, [ranks, tokens].
        of_target: ``Parts.of_target`` of each rank, of which one at most is not 0.
        mean_logits: Mean of each token's logits over all items, [tokens]; given where ε > 0.
        smoothing: Label smoothing ε.
        z_loss: Factor of lse².
    """
    of_others = reduce(torch.logaddexp2, others.unbind())  # in the same order on every rank
    target = of_target.sum(0)
    log_sum = torch.logaddexp2(of_others, target)
    lse = log_sum / LOG2_E
    # Written so, a small loss keeps its digits, and so does the target's miss of 1 below.
    losses = torch.logaddexp2(of_others - target, torch.zeros_like(target)) / LOG2_E
    if mean_logits is not None:
        losses = (1 - smoothing) * losses + smoothing * (lse - mean_logits)
    drawn = 2 * z_loss * lse
    misses = (of_others - log_sum).exp2()
    return Joined(
        losses + z_loss * lse.square(),
        log_sum,
        1 + drawn,
        drawn - (1 + drawn) * misses + smoothing,
    )


class _CrossEntropyInParts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        item_embeddings: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        shard: Shard,
        options: Options,
    ) -> Tensor:
        dtype = compute_dtype(hidden, item_embeddings)
        x = shard.gather(hidden.to(dtype).contiguous())
        if not options.triton:  # products of half precision would be rounded, not factors alone
            x = at_least_float32(x)
        table = CastTable(item_embeddings, dtype, wide=not options.triton)
        targets = shard.gather(targets)
        n_rows = len(item_embeddings)
        own = _place(targets, shard.first_item, n_rows)
        parts = _hidden_parts(x, table, bias, own, options)
        found = shard.gather_one(torch.stack([parts.others, parts.of_target]))
        mean_item = mean_logits = None
        if options.smoothing:
            mean_item, mean_bias = _means(table, bias, shard)
            mean_logits = (at_least_float32(x) * mean_item).sum(1) * options.scale + mean_bias
        joined = join(found[:, 0], found[:, 1], mean_logits, options.smoothing, options.z_loss)
        grad_hidden = None
        if parts.mean is not None:
            grad_hidden = _hidden_gradient(parts.mean, parts.others, joined, table, own, shard)
            if mean_item is not None:
                grad_hidden -= options.smoothing * mean_item
            grad_hidden *= options.scale
        ctx.save_for_backward(
            x, table.held, bias, own, joined.log_sum, joined.target_weights, grad_hidden
        )
        ctx.options = options
        ctx.n_items = shard.n_items
        ctx.dtypes = hidden.dtype, dtype, item_embeddings.dtype
        outside = (targets < 0) | (targets >= shard.n_items)
        return joined.losses.masked_fill(outside, torch.nan).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, held, bias, own, log_sum, target_weights, grad_hidden = ctx.saved_tensors
        of_hidden, dtype, of_table = ctx.dtypes
        grads: list[Tensor | None] = [None, None]
        if ctx.needs_input_grad[0]:
            grads[0] = scaled(grad_hidden, grad / len(x), of_hidden)
        if ctx.needs_input_grad[1]:
            table = CastTable(held, dtype, wide=not ctx.options.triton)
            grads[1] = of_items = torch.empty(held.shape, dtype=of_table, device=held.device)
            for rows, w in table.ranges():
                _fill_table_gradient(
                    of_items[rows],
                    x,
                    w,
                    None if bias is None else bias[rows],
                    _place(own, rows.start, len(w)),
                    log_sum,
                    target_weights,
                    grad,
                    ctx.n_items,
                    ctx.options,
                )
        return (*grads, None, None, None, None)


def _place(items: Tensor, first: int, n_rows: int) -> Tensor:
    """Return where items are among ``n_rows`` from ``first`` on; -1 for one that is elsewhere."""
    place = items - first
    return torch.where((place >= 0) & (place < n_rows), place, -1)


def _hidden_parts(
    x: Tensor, table: CastTable, bias: Tensor | None, own: Tensor, options: Options
) -> Parts:
    """Pass over this rank's items, a range at a time."""

    def parts() -> Iterator[Parts]:
        for rows, w in table.ranges():
            of_rows = None if bias is None else bias[rows]
            yield _range_parts(x, w, of_rows, _place(own, rows.start, len(w)), options)

    return reduce(_both, parts())


def _range_parts(x: Tensor, w: Tensor, bias: Tensor | None, own: Tensor, options: Options) -> Parts:
    if not options.triton:
        return shard_passes.hidden_parts(x, w, bias, own, options.scale, grad=options.grad)
    from sce_pipeline.losses.kernels import cce as kernels

    terms = kernels.Terms(options.scale, 0.0, 0.0, options.skip_mass, bias, None, None, None, None)
    return kernels.hidden_parts(x, w, own, terms, grad=options.grad)


def _both(one: Parts, other: Parts) -> Parts:
    """Return what the items of both contribute; the means of ``one`` are overwritten."""
    others = torch.logaddexp2(one.others, other.others)
    mean = None
    if one.mean is not None and other.mean is not None:
        # Where neither has another item, the finite number keeps inf - inf away.
        base = others.clamp(min=torch.finfo(others.dtype).min)
        share, other_share = ((part.others - base).exp2()[:, None] for part in (one, other))
        mean = one.mean.mul_(share).addcmul_(other.mean, other_share)
    return Parts(others, one.of_target + other.of_target, mean)


def _hidden_gradient(
    mean: Tensor, others: Tensor, joined: Joined, table: CastTable, own: Tensor, shard: Shard
) -> Tensor:
    """Return the derivative of this rank's losses by their products with the items, [tokens, d]."""
    shares = (others - joined.log_sum).exp2() * joined.row_factors
    gradient = mean.mul_(shares[:, None])
    weights = joined.target_weights.masked_fill(own < 0, 0.0)
    rows = table.take(own.clamp(min=0)).to(gradient.dtype)
    return shard.sum(gradient.addcmul_(rows, weights[:, None]))


def _fill_table_gradient(
    gradient: Tensor,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    own: Tensor,
    log_sum: Tensor,
    weights: Tensor,
    upstream: Tensor,
    n_items: int,
    options: Options,
) -> None:
    """Fill in ``upstream`` times the gradient of the mean loss by these items, [rows, d]."""
    # What smoothing takes from all items, and what may be left out in all: these items' share.
    share = len(w) / n_items
    scale, z_loss, smoothing = options.scale, options.z_loss, options.smoothing * share
    if not options.triton:
        of_sum = shard_passes.table_gradient(
            x, w, bias, own, scale, log_sum, weights, z_loss, smoothing
        )
        torch.mul(of_sum, (upstream / len(x)).reshape(1), out=gradient)
        return
    from sce_pipeline.losses.kernels import cce as kernels

    sum_token = x.sum(0, dtype=torch.float32) if smoothing else None
    norms_and_mean = None, None, None
    terms = kernels.Terms(
        scale, smoothing, z_loss, options.skip_mass * share, bias, *norms_and_mean, sum_token
    )
    sums = kernels.joined_sums(x, log_sum, weights)
    tokens = kernels.tokens_by_block(x, w, own)
    kernels.table_pass(x, w, own, tokens, terms, sums, upstream, gradient, grad_bias=False)


def _means(table: CastTable, bias: Tensor | None, shard: Shard) -> tuple[Tensor, Tensor]:
    """Return the means over all ranks' items, of their embeddings, [d], and of their biases."""
    sums = table.sum()
    of_bias = sums.new_zeros(()) if bias is None else bias.sum()
    means = shard.gather_one(torch.cat([sums, of_bias[None]])).sum(0) / shard.n_items
    return means[:-1], means[-1]
