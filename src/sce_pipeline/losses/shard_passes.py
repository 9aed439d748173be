"""The two passes of exact cross-entropy over some of the items, in PyTorch.

They do what ``kernels.cce.hidden_parts`` and ``kernels.cce.table_pass`` do. Logits are those of
base 2, as there; a target of -1 is an item that others have.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sce_pipeline.losses.base import chunks, matmul

LOG2_E = math.log2(math.e)


class Parts(NamedTuple):
    """What some of the items contribute to each token's softmax.

    The target is kept apart from the other items, as 1 minus its probability would be lost in a
    rounded probability.

    Attributes:
        others: Logsumexp of base 2 of the logits of all these items but the target, float32 at
            least [tokens]; -inf where there is no other.
        of_target: The target's logit of base 2, or 0 where it is not among these items, [tokens].
        mean: Mean of the items but the target by their softmax, [tokens, d], or ``None``; 0 where
            there is no other.
    """

    others: Tensor
    of_target: Tensor
    mean: Tensor | None


def hidden_parts(
    x: Tensor, w: Tensor, bias: Tensor | None, targets: Tensor, scale: float, *, grad: bool
) -> Parts:
    """Pass over the items for what they contribute to each token.

    Args:
        x: Hidden states, float32 or float64 [tokens, d].
        w: Item embeddings, of the same dtype [rows, d], at least one.
        bias: Addend of each item's logit, [rows], or ``None`` for 0.
        targets: Rows of the targets, -1 for an item that is not among them, int64 [tokens].
        scale: Factor of the inner products.
        grad: Whether to compute the means.
    """
    parts = Parts(x.new_empty(len(x)), x.new_empty(len(x)), torch.empty_like(x) if grad else None)
    for chunk in chunks(len(x), len(w), x.device):
        z = _logits(x[chunk], w, bias, scale)
        of_target = z.gather(1, targets[chunk, None].clamp(min=0))[:, 0]
        parts.of_target[chunk] = of_target.masked_fill(targets[chunk] < 0, 0.0)
        _replace_targets(z, targets[chunk], torch.full_like(of_target, -torch.inf))
        # Where there is no other item, the finite number keeps inf - inf away.
        highest = z.amax(1).clamp(min=torch.finfo(z.dtype).min)
        p = z.sub_(highest[:, None]).exp2_()
        total = p.sum(1)
        parts.others[chunk] = highest + total.log2()
        if parts.mean is not None:
            parts.mean[chunk] = matmul(p, w) / total.clamp(min=1.0)[:, None]
    return parts


def table_gradient(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    scale: float,
    log_sum: Tensor,
    target_weights: Tensor,
    z_loss: float,
    smoothing: float,
) -> Tensor:
    """Pass over the tokens for the gradient of the sum of their losses by the items, [rows, d].

    Args:
        x: As in ``hidden_parts``, and likewise ``w``, ``bias``, ``targets`` and ``scale``.
        w: Item embeddings.
        bias: Addend of each item's logit.
        targets: Rows of the targets.
        scale: Factor of the inner products.
        log_sum: Logsumexp of base 2 of each token's logits of all items there are, [tokens].
        target_weights: Derivative of each loss by its target's logit, but for what label smoothing
            takes from every item's, [tokens].
        z_loss: Factor λ of lse².
        smoothing: Label smoothing of these items together: ε of all, times their share of all.
    """
    row_factors = 1 + 2 * z_loss / LOG2_E * log_sum
    grad = torch.zeros_like(w)
    for chunk in chunks(len(x), len(w), x.device):
        by_logit = _logits(x[chunk], w, bias, scale).sub_(log_sum[chunk, None]).exp2_()
        by_logit *= row_factors[chunk, None]
        _replace_targets(by_logit, targets[chunk], target_weights[chunk])
        grad += matmul(by_logit.sub_(smoothing / len(w)).T, x[chunk])
    return grad.mul_(scale)


def _logits(x: Tensor, w: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    z = matmul(x, w.T).mul_(scale * LOG2_E)
    return z if bias is None else z.add_(bias, alpha=LOG2_E)


def _replace_targets(values: Tensor, targets: Tensor, new: Tensor) -> None:
    """Put ``new`` [tokens] where the targets are in ``values`` [tokens, rows]."""
    place = targets[:, None].clamp(min=0)
    kept = torch.where(targets[:, None] < 0, values.gather(1, place), new[:, None])
    values.scatter_(1, place, kept)
