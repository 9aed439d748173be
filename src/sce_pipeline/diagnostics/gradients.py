"""How far a loss's gradient is from that of the exact cross-entropy."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from sce_pipeline.losses.base import at_least_float32, check_tensors, chunks


class Agreement(NamedTuple):
    """A gradient g beside the exact one, e, each taken as one long vector.

    Attributes:
        relative_error: ‖g - e‖ / ‖e‖. A loss that takes its mean over fewer tokens, as SCE does, or
            over more terms, as BCE does, has a longer or shorter gradient, which counts here.
        cosine: ⟨g, e⟩ / (‖g‖·‖e‖), whatever their lengths; NaN where g is 0.
    """

    relative_error: float
    cosine: float


class GradientComparison(NamedTuple):
    """A loss beside the exact cross-entropy of the same batch.

    Attributes:
        value: The loss.
        exact_value: The mean cross-entropy over the whole catalogue.
        hidden: Agreement of the gradients of the hidden states.
        table: Agreement of the gradients of the item table.
    """

    value: float
    exact_value: float
    hidden: Agreement
    table: Agreement


def compare_gradients(
    mean_loss: Callable[[Tensor, Tensor], Tensor],
    hidden: Tensor,
    item_embeddings: Tensor,
    targets: Tensor,
) -> GradientComparison:
    """Compare value and gradients of a loss with those of the exact mean cross-entropy.

    Args:
        mean_loss: Gives the loss, a scalar, of hidden states and table.
        hidden: [tokens, d]; no gradient is left in it.
        item_embeddings: [n_items, d]; likewise.
        targets: int64 [tokens].

    Raises:
        TypeError: The dtypes do not fit together.
        ValueError: The shapes or devices do not fit together.
    """
    check_tensors(hidden, item_embeddings, targets=targets)
    hidden = hidden.detach().clone().requires_grad_()
    item_embeddings = item_embeddings.detach().clone().requires_grad_()
    value = mean_loss(hidden, item_embeddings)
    gradients = torch.autograd.grad(value, (hidden, item_embeddings))
    exact_value, *exact = _exact(hidden, item_embeddings, targets)
    agreements = (_agreement(*pair) for pair in zip(gradients, exact, strict=True))
    return GradientComparison(value.item(), exact_value, *agreements)


def _exact(
    hidden: Tensor, item_embeddings: Tensor, targets: Tensor
) -> tuple[float, Tensor, Tensor]:
    """Return the exact cross-entropy and its gradients, made for a block of tokens at a time."""
    value = 0.0
    grad_hidden, grad_table = torch.zeros_like(hidden), torch.zeros_like(item_embeddings)
    for block in chunks(len(hidden), len(item_embeddings), hidden.device):
        queries = hidden[block]
        logits = at_least_float32(queries @ item_embeddings.T)
        total = functional.cross_entropy(logits, targets[block], reduction="sum") / len(hidden)
        grad_hidden[block], grad_of_block = torch.autograd.grad(total, (queries, item_embeddings))
        grad_table += grad_of_block
        value += total.item()
    return value, grad_hidden, grad_table


def _agreement(gradient: Tensor, exact: Tensor) -> Agreement:
    gradient, exact = gradient.double().flatten(), exact.double().flatten()
    error = (gradient - exact).norm() / exact.norm()
    cosine = gradient @ exact / (gradient.norm() * exact.norm())
    return Agreement(error.item(), cosine.item())
