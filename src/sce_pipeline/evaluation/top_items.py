"""The first items of each user, where nobody asks for the rank of a target."""

from __future__ import annotations

import torch
from torch import Tensor

from sce_pipeline.evaluation.ranking import (
    LEFT_OUT,
    TopItems,
    check_sizes,
    first_items,
    score_blocks,
    scorer,
)
from sce_pipeline.losses.implementation import takes_triton

SCORES_AT_ONCE = 2**27
"""Most scores held at once on a GPU, unless one user has more: 512 MiB. What is more is looked
through by groups of items; for less, launching what that takes is the longer part."""


@torch.no_grad()
def find_top_items(
    hidden: Tensor,
    item_embeddings: Tensor,
    seen: tuple[Tensor, Tensor] | None,
    k: int,
    excluded: Tensor | None = None,
) -> TopItems:
    """Find the first items of some users, in the order of ``rank_block``.

    Scores are products in float32. No more than ``SCORES_AT_ONCE`` of them exist at once, unless
    one user has more. On a GPU, which way they are found, and so the last bits of a score, may
    depend on the number of users; by groups, a copy of the table in bfloat16 is made. The device is
    waited for a few times.

    Args:
        hidden: A state for each user, [users, d].
        item_embeddings: The item table, [n_items, d].
        seen: Each user's items to leave out, as for ``rank_block``.
        k: Length of the lists, 1 or more.
        excluded: Which items to leave out for everybody, bool [n_items]; None leaves out nothing.

    Raises:
        ValueError: The shapes or devices do not fit together, or k is less than 1.
    """
    n_items = len(item_embeddings)
    check_sizes(len(hidden), n_items, seen, None)
    if k < 1:
        raise ValueError(f"k must be 1 or more, got {k}")
    if hidden.shape[1] != item_embeddings.shape[1] or hidden.device != item_embeddings.device:
        raise ValueError(
            f"hidden states [{hidden.shape[1]}] on {hidden.device} do not go with item embeddings "
            f"[{item_embeddings.shape[1]}] on {item_embeddings.device}"
        )
    if excluded is not None and len(excluded) != n_items:
        raise ValueError(f"excluded must say of {n_items} items whether, got {len(excluded)}")
    kernels = takes_triton("auto", hidden, item_embeddings, deterministic=True)
    if kernels and len(hidden) * n_items > SCORES_AT_ONCE:
        from sce_pipeline.evaluation.top_groups import find_by_groups  # noqa: PLC0415 - Linux's

        return find_by_groups(hidden, item_embeddings, seen, k, excluded)
    return find_among_all(hidden, item_embeddings, seen, k, excluded)


def find_among_all(
    hidden: Tensor,
    item_embeddings: Tensor,
    seen: tuple[Tensor, Tensor] | None,
    k: int,
    excluded: Tensor | None = None,
) -> TopItems:
    """Do what ``find_top_items`` does by all scores, of some users after the others."""
    top = TopItems.none(len(hidden), k, hidden.device)
    score, size = scorer(hidden, item_embeddings), (len(hidden), len(item_embeddings))
    for users, scores, finite in score_blocks(
        score, *size, hidden.device, seen, None, SCORES_AT_ONCE
    ):
        if excluded is not None:
            scores.masked_fill_(excluded, LEFT_OUT)
        top.finite[users] = finite
        top.items[users], top.scores[users] = first_items(scores, k, None)
    return top
