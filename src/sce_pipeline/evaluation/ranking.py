"""Where each user's target stands among all items, and which items stand first.

Items are ordered by score, equal scores by id, the lower first. The order is total, so that scores
give one rank and one list of top items, whatever the device and the size of the blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from sce_pipeline.evaluation.held_out import UserBlock, UserBlocks

SCORES_AT_ONCE = 2**24
"""Most scores held at once, unless one user has more: 0.3 GB with all that is made of them."""

NEVER_RANKED = torch.iinfo(torch.int64).max
"""Rank of a target that is in the history while seen items are left out: beyond every cutoff."""

NO_ITEM = -1
"""Fills the end of a list of top items where fewer items are left than it has places."""

_LEFT_OUT = torch.iinfo(torch.int64).min
"""Key of a seen item, below those of all scores."""


@dataclass(frozen=True)
class Ranking:
    """Ranks and top items of some users.

    Attributes:
        target_ranks: Rank of each user's target, 1 the best, or ``NEVER_RANKED``; int64 [users].
        top_items: The first k items of each user, best first, then ``NO_ITEM``; int64 [users, k].
    """

    target_ranks: Tensor
    top_items: Tensor


@torch.no_grad()
def rank_block(
    hidden: Tensor,
    item_embeddings: Tensor,
    targets: Tensor,
    seen: tuple[Tensor, Tensor] | None,
    k: int,
) -> Ranking:
    """Rank all items for some users by the product of hidden state and item embedding.

    Products are taken in float32, also under autocast. Whatever the number of users, no more than
    ``SCORES_AT_ONCE`` scores exist at once.

    Args:
        hidden: A state for each user, [users, d].
        item_embeddings: The item table, [n_items, d].
        targets: The item to find, int64 [users].
        seen: Items to leave out: those of user i are ``items[offsets[i]:offsets[i + 1]]`` of
            (items [total], offsets int64 [users + 1]). None leaves out nothing.
        k: Length of the list of top items; with 0 only ranks are computed.

    Raises:
        ValueError: The shapes do not fit together, or scores are not finite.
    """
    n_users, n_items = len(hidden), len(item_embeddings)
    if len(targets) != n_users:
        raise ValueError(f"{n_users} hidden states need as many targets, got {len(targets)}")
    if seen is not None and len(seen[1]) != n_users + 1:
        raise ValueError(f"{n_users} hidden states need {n_users + 1} offsets, got {len(seen[1])}")
    target_ranks = torch.empty(n_users, dtype=torch.int64, device=hidden.device)
    top_items = torch.empty(n_users, k, dtype=torch.int64, device=hidden.device)
    block = max(1, SCORES_AT_ONCE // n_items)
    for start in range(0, n_users, block):
        users = slice(start, start + block)
        scores = _scores(hidden[users], item_embeddings)
        block_seen = seen and (seen[0], seen[1][start : start + block + 1])
        target_ranks[users], top_items[users] = _rank(scores, targets[users], block_seen, k)
    return Ranking(target_ranks, top_items)


def rank_all(
    encode: Callable[[UserBlock], Tensor],
    item_embeddings: Tensor,
    sequences: Mapping[str, np.ndarray],
    k: int,
    filter_seen: bool,
) -> dict[str, np.ndarray]:
    """Rank all items for all held-out users, block by block, on the device of the item embeddings.

    Args:
        encode: Maps a block of users, on that device, to their hidden states [users, d].
        item_embeddings: The item table, [n_items, d].
        sequences: Held-out users, as ``check_sequences`` describes them.
        k: Length of the lists of top items.
        filter_seen: Whether to leave the items of a user's history out.

    Returns:
        ``users`` and ``targets`` int32 [n], ``target_ranks`` int64 [n], ``top_items`` int32 [n, k],
        ``n_items`` int64 [1]: row i is about ``users[i]``.

    Raises:
        ValueError: The sequences are malformed or of another catalogue, or scores are not finite.
    """
    n_items = int(sequences["n_items"][0])
    if len(item_embeddings) != n_items:
        raise ValueError(
            f"the sequences are of {n_items} items, but {len(item_embeddings)} have an embedding; "
            "train and evaluate on the same data"
        )
    target_ranks, top_items = [], []
    for on_host in track(UserBlocks(sequences, filter_seen), description="Ranking"):
        block = on_host.to(item_embeddings.device)
        ranking = rank_block(encode(block), item_embeddings, block.targets, block.seen, k)
        target_ranks.append(ranking.target_ranks.cpu())
        top_items.append(ranking.top_items.int().cpu())
    return {
        "users": sequences["users"],
        "targets": sequences["targets"],
        "target_ranks": torch.cat(target_ranks).numpy(),
        "top_items": torch.cat(top_items).numpy(),
        "n_items": sequences["n_items"],
    }


def _scores(hidden: Tensor, item_embeddings: Tensor) -> Tensor:
    """Score every item for every user: float32 [users, n_items], all finite."""
    with torch.autocast(hidden.device.type, enabled=False):
        scores = hidden.float() @ item_embeddings.float().T
    finite = scores.isfinite().all(dim=1)
    if not finite.all():
        raise ValueError(
            f"{int((~finite).sum())} of {len(finite)} users have scores that are not finite: "
            "their hidden states or the item embeddings hold NaN, infinity or huge numbers"
        )
    return scores


def _rank(
    scores: Tensor, targets: Tensor, seen: tuple[Tensor, Tensor] | None, k: int
) -> tuple[Tensor, Tensor]:
    """Rank by scores [users, n_items], which are overwritten: target ranks and top items."""
    keys = _keys(scores)
    if seen is not None:
        items, offsets = seen
        rows = torch.repeat_interleave(offsets.diff())
        keys[rows, items[offsets[0] : offsets[-1]].long()] = _LEFT_OUT
    target_keys = keys.gather(1, targets[:, None])
    ranks = 1 + (keys > target_keys).sum(dim=1)
    ranks.masked_fill_(target_keys[:, 0] == _LEFT_OUT, NEVER_RANKED)
    return ranks, _top_items(keys, k)


def _keys(scores: Tensor) -> Tensor:
    """Turn scores into distinct integers, int64 [users, n_items], in the order of the items."""
    # Floats compare as their bits do, once the bits of negative ones are turned around; adding 0
    # makes -0 into 0. The score then takes the upper half of the key, the id the lower.
    bits = scores.add_(0.0).view(torch.int32)
    keys = torch.where(bits < 0, bits ^ torch.iinfo(torch.int32).max, bits).long()
    return keys.mul_(2**32).sub_(torch.arange(scores.shape[1], device=scores.device))


def _top_items(keys: Tensor, k: int) -> Tensor:
    """Find the k items with the greatest keys, int64 [users, k]."""
    top_items = torch.full((len(keys), k), NO_ITEM, device=keys.device)
    if k > 0:
        width = min(k, keys.shape[1])
        top_keys, items = keys.topk(width, dim=1)
        top_items[:, :width] = items.masked_fill(top_keys == _LEFT_OUT, NO_ITEM)
    return top_items
