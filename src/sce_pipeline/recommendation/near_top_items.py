"""The first items of some users by an index: nearly those of all items, and the filters hold."""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor

from sce_pipeline.evaluation.ranking import NO_ITEM, TopItems, seen_by
from sce_pipeline.evaluation.top_items import find_top_items
from sce_pipeline.recommendation.item_index import ItemIndex

MOST_FETCHED = 2048
"""Most items asked of the index for a user; where filters take more, all items are ranked."""

SPARE = 2
"""How many times as many items are asked for as would be left if filters took items evenly."""

NUMBERS_AT_ONCE = 2**21
"""Most numbers of embeddings held at once, unless one user has more: 8 MiB."""

Seen = tuple[Tensor, Tensor]


@torch.no_grad()
def find_near_top_items(
    index: ItemIndex,
    hidden: Tensor,
    item_embeddings: Tensor,
    seen: Seen | None,
    k: int,
    excluded: Tensor | None = None,
) -> TopItems:
    """Find nearly the first items of some users, in the order of ``find_top_items``.

    The index gives more items than are asked for; what is left out is taken from these, and the
    rest is scored and ordered anew, so that filters and scores are exact and only an item that the
    index overlooks is missed. All items are ranked for a user of whom fewer than ``k`` are left.
    Waits for the device, since the index is searched on the CPU.

    Args:
        index: Of the items of the table.
        hidden: As for ``find_top_items``, like all that follows.
        item_embeddings: The item table.
        seen: Each user's items to leave out.
        k: Length of the lists.
        excluded: Which items to leave out for everybody.

    Raises:
        ValueError: ``excluded`` is not of the items of the table.
    """
    if excluded is not None and len(excluded) != len(item_embeddings):
        raise ValueError(
            f"excluded must say of {len(item_embeddings)} items whether, got {len(excluded)}"
        )
    n_fetched = _n_fetched(seen, k, excluded)
    if n_fetched > min(MOST_FETCHED, len(item_embeddings)):
        return find_top_items(hidden, item_embeddings, seen, k, excluded)
    found = index.search(hidden, n_fetched)
    scores = _score(hidden, item_embeddings, found)
    finite = scores.isfinite().all(dim=1)
    scores.masked_fill_(_left_out(found, len(item_embeddings), seen, excluded), -torch.inf)
    items, scores = _order(found, scores, k)
    top = TopItems(items, scores, finite)
    short = (items[:, k - 1] == NO_ITEM).nonzero()[:, 0]
    if len(short):
        left_out = seen_by(seen, short.cpu())
        exact = find_top_items(hidden[short], item_embeddings, left_out, k, excluded)
        top.items[short], top.scores[short] = exact.items, exact.scores
        top.finite[short] = exact.finite
    return top


def _n_fetched(seen: Seen | None, k: int, excluded: Tensor | None) -> int:
    """Return how many items to ask for, so that few users have too few left."""
    wanted = k
    if excluded is not None:
        n_kept = len(excluded) - int(excluded.sum())
        wanted = ceil(SPARE * k * len(excluded) / max(1, n_kept))
    if seen is not None:
        wanted += min(int(seen[1].diff().max()), MOST_FETCHED // 8)
    return wanted


def _score(hidden: Tensor, item_embeddings: Tensor, items: Tensor) -> Tensor:
    """Return products in float32, [users, n]; what stands for no item has that of item 0."""
    at_once = max(1, NUMBERS_AT_ONCE // (items.shape[1] * hidden.shape[1]))
    parts = zip(hidden.float().split(at_once), items.split(at_once), strict=True)
    return torch.cat(
        [
            (item_embeddings[found.clamp(min=0)].float() @ states[:, :, None]).squeeze(2)
            for states, found in parts
        ]
    )


def _left_out(items: Tensor, n_items: int, seen: Seen | None, excluded: Tensor | None) -> Tensor:
    """Tell which of the items found for each user are to be left out, bool [users, n]."""
    left_out = items == NO_ITEM
    if excluded is not None:
        left_out |= excluded[items]  # the last item's for no item, which is left out in any case
    if seen is not None:
        seen_items, offsets = seen
        lengths = offsets.diff().to(items.device)
        owners = torch.repeat_interleave(lengths, output_size=len(seen_items))
        firsts = torch.arange(len(items), device=items.device)[:, None] * n_items
        left_out |= torch.isin(firsts + items, owners * n_items + seen_items)
    return left_out


def _order(items: Tensor, scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Put the first k in order of their scores, equal ones by number."""
    items, by_number = items.sort(dim=1)
    scores, by_score = scores.gather(1, by_number).sort(dim=1, descending=True, stable=True)
    items = items.gather(1, by_score).masked_fill_(scores == -torch.inf, NO_ITEM)
    return items[:, :k], scores[:, :k]
