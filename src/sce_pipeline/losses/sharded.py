"""CCE over an item table whose rows are spread over the ranks of a process group.

Each rank passes over its own rows for everybody's tokens. For one token, that gives the logsumexp
of its items and their mean by softmax; what ranks exchange are the hidden states, those logsumexps
and, for the sum of their gradients, the means: nothing that grows with the catalogue.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd.function import once_differentiable

from sce_pipeline.collectives import gather_rows, sum_rows
from sce_pipeline.losses import shard_passes
from sce_pipeline.losses.base import at_least_float32, check_tensors, scaled
from sce_pipeline.losses.cce import check_numbers, check_per_item, decides_for_triton
from sce_pipeline.losses.implementation import Implementation, compute_dtype
from sce_pipeline.losses.shard_passes import LOG2_E, Parts


class Shard(NamedTuple):
    """Where this rank's items and tokens are among everybody's.

    Attributes:
        first_item: The item of this rank's first row.
        n_items: Items of all ranks together.
        counts: Tokens of each rank.
        group: The ranks that share the table.
    """

    first_item: int
    n_items: int
    counts: Sequence[int]
    group: dist.ProcessGroup | None


class Options(NamedTuple):
    """What is computed and by whom; the numbers are those of ``cut_cross_entropy``."""

    smoothing: float
    z_loss: float
    scale: float
    skip_mass: float
    triton: bool
    grad: bool


def sharded_cross_entropy(
    hidden: Tensor,
    item_embeddings: Tensor,
    targets: Tensor,
    *,
    first_item: int,
    n_items: int,
    counts: Sequence[int],
    group: dist.ProcessGroup | None = None,
    log_probability: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
    skip_mass: float = 0.0,
    impl: Implementation = "auto",
) -> Tensor:
    """Return the mean over all ranks' tokens of the cross-entropy over all ranks' items.

    It is ``cut_cross_entropy`` of everybody's hidden states and the whole table, and the same bits
    on every rank. The backward needs no exchange: it gives this rank's hidden states and this
    rank's rows their gradients of that one mean, so the gradients of weights that all ranks have
    are to be added up over the ranks, not averaged. All ranks must call it alike, those without
    tokens too, with gradients enabled on all or on none, and multiply the loss by the same number.

    ``skip_mass`` has the bounds that ``cut_cross_entropy`` states: a rank leaves out, of a token's
    softmax, at most δ times its items' part for the hidden states and δ times its share of the
    items for the table.

    Args:
        hidden: This rank's hidden states, floating [counts[rank], d].
        item_embeddings: This rank's rows of the live table, floating [rows, d], at least one.
        targets: The items to predict, among all there are, int64 [counts[rank]]. If one is out of
            range, the loss is NaN, on every rank.
        first_item: The item of this rank's first row; the ranks' rows make up the catalogue.
        n_items: Items of all ranks together.
        counts: How many tokens each rank has; the same on every rank.
        group: The ranks that share the table; all there are where ``None``.
        log_probability: log q of this rank's items, floating [rows]; see ``cut_cross_entropy``.
        label_smoothing: ε, at least 0 and under 1.
        z_loss: At least 0.
        logit_scale: A positive number.
        skip_mass: δ, at least 0 and under 1.
        impl: Which implementation computes; see ``CCE``.

    Returns:
        A scalar, in float32 or, for float64 arguments, in float64. No token anywhere gives 0.

    Raises:
        TypeError: The dtypes do not fit together.
        ValueError: Shapes, numbers, counts or devices are not as said, or ``impl`` cannot compute
            them.
    """
    check_tensors(hidden, item_embeddings, targets=targets)
    check_numbers(label_smoothing, z_loss, logit_scale, skip_mass)
    last_item = first_item + len(item_embeddings)
    if not 0 <= first_item < last_item <= n_items:
        raise ValueError(
            f"expected at least one row of the {n_items} items (n_items), got item_embeddings of "
            f"items {first_item} (first_item) to {last_item - 1}"
        )
    bias = None
    if log_probability is not None:
        check_per_item("log_probability", log_probability, item_embeddings)
        wide = torch.promote_types(item_embeddings.dtype, torch.float32)
        bias = -log_probability.detach().to(wide).contiguous()
    triton = decides_for_triton(impl, hidden, item_embeddings)
    if not sum(counts):
        return at_least_float32(hidden.sum() + item_embeddings[:0].sum())
    options = Options(
        label_smoothing, z_loss, logit_scale, skip_mass, triton, torch.is_grad_enabled()
    )
    shard = Shard(first_item, n_items, counts, group)
    return _ShardedCrossEntropy.apply(hidden, item_embeddings, bias, targets, shard, options)


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


class _ShardedCrossEntropy(torch.autograd.Function):
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
        x = gather_rows(hidden.to(dtype).contiguous(), shard.counts, shard.group)
        w = item_embeddings.to(dtype).contiguous()
        if not options.triton:  # products of half precision would be rounded, not factors alone
            x, w = at_least_float32(x), at_least_float32(w)
        targets = gather_rows(targets, shard.counts, shard.group)
        own = targets - shard.first_item
        own = torch.where((own >= 0) & (own < len(w)), own, -1)
        parts = _hidden_parts(x, w, bias, own, options)
        # One row a rank.
        found = torch.stack([parts.others, parts.of_target])[None]
        found = gather_rows(found, [1] * len(shard.counts), shard.group)
        mean_item = mean_logits = None
        if options.smoothing:
            mean_item, mean_bias = _means(w, bias, shard)
            mean_logits = (at_least_float32(x) * mean_item).sum(1) * options.scale + mean_bias
        joined = join(found[:, 0], found[:, 1], mean_logits, options.smoothing, options.z_loss)
        grad_hidden = None
        if parts.mean is not None:
            grad_hidden = _hidden_gradient(parts.mean, parts.others, joined, w, own, shard)
            if mean_item is not None:
                grad_hidden -= options.smoothing * mean_item
            grad_hidden *= options.scale
        ctx.save_for_backward(x, w, bias, own, joined.log_sum, joined.target_weights, grad_hidden)
        # What smoothing takes from all items, and what may be left out in all: these items' share.
        share = len(w) / shard.n_items
        ctx.options = options._replace(
            smoothing=options.smoothing * share, skip_mass=options.skip_mass * share
        )
        ctx.dtypes = hidden.dtype, item_embeddings.dtype
        outside = (targets < 0) | (targets >= shard.n_items)
        return joined.losses.masked_fill(outside, torch.nan).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w, bias, own, log_sum, target_weights, grad_hidden = ctx.saved_tensors
        of_hidden, of_table = ctx.dtypes
        grads: list[Tensor | None] = [None, None]
        if ctx.needs_input_grad[0]:
            grads[0] = scaled(grad_hidden, grad / len(x), of_hidden)
        if ctx.needs_input_grad[1]:
            grads[1] = _table_gradient(
                x, w, bias, own, log_sum, target_weights, grad, of_table, ctx.options
            )
        return (*grads, None, None, None, None)


def _hidden_parts(
    x: Tensor, w: Tensor, bias: Tensor | None, own: Tensor, options: Options
) -> Parts:
    if not options.triton:
        return shard_passes.hidden_parts(x, w, bias, own, options.scale, grad=options.grad)
    from sce_pipeline.losses.kernels import cce as kernels

    terms = kernels.Terms(options.scale, 0.0, 0.0, options.skip_mass, bias, None, None, None, None)
    return kernels.hidden_parts(x, w, own, terms, grad=options.grad)


def _hidden_gradient(
    mean: Tensor, others: Tensor, joined: Joined, w: Tensor, own: Tensor, shard: Shard
) -> Tensor:
    """Return the derivative of this rank's losses by their products with the items, [tokens, d]."""
    shares = (others - joined.log_sum).exp2() * joined.row_factors
    gradient = mean.mul_(shares[:, None])
    weights = joined.target_weights.masked_fill(own < 0, 0.0)
    rows = w.index_select(0, own.clamp(min=0)).to(gradient.dtype)
    return sum_rows(gradient.addcmul_(rows, weights[:, None]), shard.counts, shard.group)


def _table_gradient(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    own: Tensor,
    log_sum: Tensor,
    weights: Tensor,
    upstream: Tensor,
    dtype: torch.dtype,
    options: Options,
) -> Tensor:
    """Return ``upstream`` times the gradient of the mean loss by these items, [rows, d]."""
    scale, z_loss, smoothing = options.scale, options.z_loss, options.smoothing
    if not options.triton:
        gradient = shard_passes.table_gradient(
            x, w, bias, own, scale, log_sum, weights, z_loss, smoothing
        )
        return scaled(gradient, upstream / len(x), dtype)
    from sce_pipeline.losses.kernels import cce as kernels

    sum_token = x.sum(0, dtype=torch.float32) if smoothing else None
    norms_and_mean = None, None, None
    terms = kernels.Terms(
        scale, smoothing, z_loss, options.skip_mass, bias, *norms_and_mean, sum_token
    )
    sums = kernels.joined_sums(x, log_sum, weights)
    return kernels.table_pass(x, w, own, terms, sums, upstream, dtype, grad_bias=False)[0]


def _means(w: Tensor, bias: Tensor | None, shard: Shard) -> tuple[Tensor, Tensor]:
    """Return the means over all ranks' items, of their embeddings, [d], and of their biases."""
    sums = w.sum(0, dtype=torch.promote_types(w.dtype, torch.float32))
    of_bias = sums.new_zeros(()) if bias is None else bias.sum()
    sums = torch.cat([sums, of_bias[None]])[None]
    means = gather_rows(sums, [1] * len(shard.counts), shard.group).sum(0) / shard.n_items
    return means[:-1], means[-1]
