"""CCE over an item table whose rows are spread over the ranks of a process group."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch import distributed as dist

from sce_pipeline.losses.base import at_least_float32, check_tensors
from sce_pipeline.losses.cce import check_numbers, check_per_item, decides_for_triton
from sce_pipeline.losses.implementation import Implementation
from sce_pipeline.losses.item_parts import Options, Shard, cross_entropy_in_parts


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

    Where autocast casts the table, a rank's cast takes ``CAST_BYTES`` at most: ranges of more rows
    are cast one after the other, in both passes (``CastTable``).

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
    return cross_entropy_in_parts(hidden, item_embeddings, bias, targets, shard, options)
