"""How much of the softmax lies on the items that a loss compares a token with."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from sce_pipeline.diagnostics.candidates import Candidates
from sce_pipeline.losses.base import at_least_float32, check_tensors, chunks


class Coverage(NamedTuple):
    """What the comparisons of a batch keep of the exact distribution.

    Let s_c be the logit of item c for a token with target y, and

        p_c = exp(s_c) / Σ_{c' ≠ y} exp(s_c')

    the softmax over all items but the target, which sums to 1. The exact gradient for the token's
    hidden state is, up to a factor, Σ p_c·w_c - w_y: an item that is not compared takes its p_c out
    of it. A mass is the sum of p_c over distinct items, so that drawing one twice adds nothing.

    Attributes:
        mass: The mass of the items whose gradient the loss keeps, [tokens]: those in the set where
            the token has its largest loss, which is the set of most mass, or, if the loss pools a
            token's sets, those in any of them.
        pooled_mass: The mass of the items in any of the token's sets, [tokens].
        covered: Whether the token has a set, bool [tokens]. For SCE, it is in a bucket: those that
            are in none take no part in the loss.
        items: Whether any token is compared with the item as a negative, bool [n_items].
    """

    mass: Tensor
    pooled_mass: Tensor
    covered: Tensor
    items: Tensor

    @property
    def token_share(self) -> float:
        """The share of tokens that are covered."""
        return self.covered.double().mean().item()

    @property
    def item_share(self) -> float:
        """The share of items that are a negative of some token."""
        return self.items.double().mean().item()


@torch.no_grad()
def measure_coverage(
    hidden: Tensor, item_embeddings: Tensor, targets: Tensor, candidates: Candidates
) -> Coverage:
    """Measure what ``candidates`` cover, in blocks of tokens.

    Args:
        hidden: [tokens, d].
        item_embeddings: [n_items, d].
        targets: int64 [tokens].
        candidates: What each token is compared with.

    Returns:
        Masses in float32 or, for float64 arguments, in float64.

    Raises:
        TypeError: The dtypes do not fit together.
        ValueError: The shapes or devices do not fit together, or the catalogue has no two items.
    """
    check_tensors(hidden, item_embeddings, targets=targets)
    n_tokens, n_items = len(hidden), len(item_embeddings)
    if n_items < 2:  # noqa: PLR2004
        raise ValueError(f"expected a catalogue of at least two items, got {n_items}")
    mass = at_least_float32(hidden.new_zeros(n_tokens))
    pooled_mass = torch.zeros_like(mass)
    items = torch.zeros(n_items, dtype=torch.bool, device=hidden.device)
    for block in chunks(n_tokens, n_items, hidden.device):
        logits = at_least_float32(hidden[block] @ item_embeddings.T)
        probabilities = logits.scatter_(1, targets[block, None], -torch.inf).softmax(1)
        negatives = _negatives(candidates, block, targets, n_items)
        pooled_mass[block] = torch.where(negatives, probabilities, 0).sum(1)
        items |= negatives.any(0)
        if not candidates.pooled:
            mass[block] = _largest_mass(candidates, block, probabilities)
    covered = candidates.covered(n_tokens)
    return Coverage(pooled_mass if candidates.pooled else mass, pooled_mass, covered, items)


def pooled_cross_entropy(
    hidden: Tensor, item_embeddings: Tensor, targets: Tensor, candidates: Candidates
) -> Tensor:
    """Return the mean, over covered tokens, of the cross-entropy among all of a token's candidates.

    An item that is in several of a token's sets counts once. For SCE this is what the largest loss
    over buckets stands for, from below: a token with one bucket has the same loss in both. It is a
    reference: each block of tokens is multiplied by the whole table, in the forward and again in
    the backward.

    The arguments are those of ``measure_coverage``; hidden states and table get gradients.
    """
    check_tensors(hidden, item_embeddings, targets=targets)
    losses = [
        checkpoint(
            _pooled_cross_entropies,
            hidden,
            item_embeddings,
            targets,
            candidates,
            block,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for block in chunks(len(hidden), len(item_embeddings), hidden.device)
    ]
    covered = candidates.covered(len(hidden))
    return torch.where(covered, torch.cat(losses), 0).sum() / covered.sum()


def _pooled_cross_entropies(
    hidden: Tensor, item_embeddings: Tensor, targets: Tensor, candidates: Candidates, block: slice
) -> Tensor:
    """Return the cross-entropy of each token of a block, 0 where it has no negative."""
    compared = _negatives(candidates, block, targets, len(item_embeddings))
    compared.scatter_(1, targets[block, None], True)
    logits = at_least_float32(hidden[block] @ item_embeddings.T)
    logits = logits.masked_fill(~compared, -torch.inf)
    return functional.cross_entropy(logits, targets[block], reduction="none")


def _negatives(candidates: Candidates, block: slice, targets: Tensor, n_items: int) -> Tensor:
    """Return which items are compared with each token of a block, bool [block, n_items]."""
    # The last column stands for no item, so for -1.
    shape = (block.stop - block.start, n_items + 1)
    negatives = torch.zeros(shape, dtype=torch.bool, device=targets.device)
    for rows, items in candidates.within(block):
        negatives[rows[:, None], items] = True
    return negatives[:, :-1].scatter_(1, targets[block, None], False)


def _largest_mass(candidates: Candidates, block: slice, probabilities: Tensor) -> Tensor:
    """Return the mass of the set with most, for each token of a block; 0 where it has no set."""
    probabilities = functional.pad(probabilities, (0, 1))
    largest = probabilities.new_zeros(len(probabilities))
    for rows, items in candidates.within(block):
        largest.scatter_reduce_(0, rows, probabilities[rows[:, None], items].sum(1), "amax")
    return largest
