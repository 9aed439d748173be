"""Where each user's target stands among all items, and which items stand first.

Items are ordered by score, equal scores by id, the lower first. The order is total, so that scores
give one rank and one list of top items, whatever the device, the size of the blocks and the shards
of the item table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor, distributed
from torch.nn import functional as F

from sce_pipeline.evaluation.held_out import UserBlock, UserBlocks

SCORES_AT_ONCE = 2**23
"""Most scores held at once, unless one user has more: 32 MiB. With what is made of them there are
75 MiB; for lists of top items up to 125, where equal scores contest the last place of each."""

SCORES_AT_ONCE_ON_CPU = 2**21
"""The same on a CPU, where they should stay in the cache: 8 MiB."""

USERS_AT_ONCE_ON_CPU = 32
"""Fewest users at once there, up to ``SCORES_AT_ONCE`` scores: each time the item table is read."""

NEVER_RANKED = torch.iinfo(torch.int64).max
"""Rank of a target that is in the history while seen items are left out: beyond every cutoff."""

NO_ITEM = -1
"""Fills the end of a list of top items where fewer items are left than it has places."""

_GROUP = 256
"""Items whose largest score stands for all of them until the best groups are known."""

_GROUPS_TO_SPARE = 4
"""As many times as there are places in a list must there be groups, or looking into them is no
less work than looking through all scores."""

LEFT_OUT = -torch.inf
"""Score of an item that is left out, below those of all others."""


@dataclass(frozen=True)
class Ranking:
    """Ranks and top items of some users; ``join_rankings`` checks that they mean something.

    Attributes:
        target_ranks: Rank of each user's target, 1 the best, or ``NEVER_RANKED``; int64 [users].
        top_items: The first k items of each user, best first, then ``NO_ITEM``; int64 [users, k].
        finite: Whether all scores of a user are finite, without which the rest is void; bool
            [users].
    """

    target_ranks: Tensor
    top_items: Tensor
    finite: Tensor

    def cpu(self) -> Ranking:
        """Return the same ranking on the CPU."""
        return Ranking(self.target_ranks.cpu(), self.top_items.cpu(), self.finite.cpu())


@dataclass(frozen=True)
class TopItems:
    """The first items of some users, best first, with their scores.

    Attributes:
        items: Ids, then ``NO_ITEM`` where fewer are left than there are places; int64 [users, k].
        scores: Their scores, then -inf; float32 [users, k].
        finite: Whether all scores of a user are finite, without which the rest is void; bool
            [users].
    """

    items: Tensor
    scores: Tensor
    finite: Tensor

    @classmethod
    def none(cls, n_users: int, k: int, device: torch.device) -> TopItems:
        """Return lists without an item, of users whose scores are finite."""
        return cls(
            torch.full((n_users, k), NO_ITEM, dtype=torch.int64, device=device),
            torch.full((n_users, k), LEFT_OUT, dtype=torch.float32, device=device),
            torch.ones(n_users, dtype=torch.bool, device=device),
        )


@dataclass(frozen=True)
class Shard:
    """The rows of an item table that is spread over the ranks of a process group.

    Attributes:
        first_item: Id of the item in this rank's first row; those in the next rows follow it.
        largest: Rows of the rank that has most, the same number on all ranks: it decides how many
            users they score at once.
        group: The ranks that hold the table.
    """

    first_item: int
    largest: int
    group: distributed.ProcessGroup

    @classmethod
    def in_order_of_ranks(cls, n_rows: int, group: distributed.ProcessGroup) -> Shard:
        """Return this rank's shard of a table whose rows are laid out rank after rank.

        All ranks of the group call it together, each with its number of rows.

        Raises:
            ValueError: A rank holds no row; raised on all of them.
        """
        sizes = [0] * group.size()
        distributed.all_gather_object(sizes, n_rows, group)
        if min(sizes) < 1:
            raise ValueError(f"every rank must hold a row of the item table, got {sizes} rows")
        first_items = list(accumulate(sizes, initial=0))
        return cls(first_items[group.rank()], max(sizes), group)

    def greatest(self, values: Tensor) -> None:
        """Replace values, of the same shape on all ranks, by the greatest of the ranks."""
        distributed.all_reduce(values, distributed.ReduceOp.MAX, self.group)

    def total(self, values: Tensor) -> None:
        """Replace values, of the same shape on all ranks, by their sum over the ranks."""
        distributed.all_reduce(values, distributed.ReduceOp.SUM, self.group)

    def gather(self, values: Tensor) -> Tensor:
        """Set the rows of all ranks side by side: [n, k] of each to [n, ranks * k] on all."""
        parts = [torch.empty_like(values) for _ in range(self.group.size())]
        distributed.all_gather(parts, values, self.group)
        return torch.cat(parts, dim=1)


@torch.no_grad()
def rank_block(
    hidden: Tensor,
    item_embeddings: Tensor,
    targets: Tensor,
    seen: tuple[Tensor, Tensor] | None,
    k: int,
    shard: Shard | None = None,
) -> Ranking:
    """Rank all items for some users by the product of hidden state and item embedding.

    Products are taken in float32, also under autocast. Whatever the number of users, no more than
    ``SCORES_AT_ONCE`` scores exist at once. With k = 0 nothing here waits for a GPU.

    Args:
        hidden: A state for each user, [users, d].
        item_embeddings: The item table, [n_items, d], or this rank's rows of it.
        targets: The item to find, int64 [users].
        seen: Items to leave out: those of user i are ``items[offsets[i]:offsets[i + 1]]`` of
            (items int64 [total], offsets int64 [users + 1]). None leaves out nothing. The offsets
            belong on the CPU: on a GPU they have to be waited for.
        k: Length of the list of top items; with 0 only ranks are computed.
        shard: Where the table is spread over ranks, which rows these are. All ranks call this with
            the same users, items to find and items to leave out, and get the same ranking.

    Raises:
        ValueError: The shapes do not fit together. Scores that are not finite are errors too, which
            ``join_rankings`` raises.
    """
    score, size = scorer(hidden, item_embeddings), (len(hidden), len(item_embeddings))
    return rank_scores(score, size, hidden.device, targets, seen, k, shard)


@torch.no_grad()
def rank_scores(
    score: Callable[[slice], Tensor],
    size: tuple[int, int],
    device: torch.device,
    targets: Tensor,
    seen: tuple[Tensor, Tensor] | None,
    k: int,
    shard: Shard | None = None,
) -> Ranking:
    """Rank all items for some users by scores that are asked for when they are needed.

    Args:
        score: Gives the scores of some of the users, float32 [users of the slice, n_items], on the
            device; they are overwritten.
        size: Number of users and of items, or of this rank's items.
        device: Where the scores are.
        targets: As for ``rank_block``, like all that follows.
        seen: Items to leave out.
        k: Length of the list of top items.
        shard: Where the items are spread over ranks, which items these are.

    Raises:
        ValueError: The shapes do not fit together.
    """
    n_users, n_items = size
    check_sizes(n_users, n_items, seen, shard)
    if len(targets) != n_users:
        raise ValueError(f"{n_users} hidden states need as many targets, got {len(targets)}")
    first_item = shard.first_item if shard else 0
    target_ranks = torch.empty(n_users, dtype=torch.int64, device=device)
    top_items = torch.empty(n_users, k, dtype=torch.int64, device=device)
    finite = torch.empty(n_users, dtype=torch.bool, device=device)
    for users, scores, all_finite in score_blocks(
        score, n_users, n_items, device, seen, shard, SCORES_AT_ONCE
    ):
        target_ranks[users], finite[users] = _rank_targets(
            scores, targets[users] - first_item, all_finite, shard
        )
        if k > 0:
            top_items[users], _ = first_items(scores, k, shard)
    return Ranking(target_ranks, top_items, finite)


def join_rankings(rankings: Sequence[Ranking]) -> Ranking:
    """Join the rankings of one or more blocks of users, on the CPU.

    Raises:
        ValueError: Some users' scores are not finite.
    """
    finite = torch.cat([ranking.finite for ranking in rankings]).cpu()
    if not finite.all():
        raise ValueError(
            f"{int((~finite).sum())} of {len(finite)} users have scores that are not finite: "
            "their hidden states or the item embeddings hold NaN, infinity or huge numbers"
        )
    return Ranking(
        torch.cat([ranking.target_ranks for ranking in rankings]).cpu(),
        torch.cat([ranking.top_items for ranking in rankings]).cpu(),
        finite,
    )


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
    n_items = len(item_embeddings)

    def rank(block: UserBlock) -> Ranking:
        return rank_block(encode(block), item_embeddings, block.targets, block.seen, k)

    return _rank_blocks(rank, n_items, item_embeddings.device, sequences, filter_seen)


def rank_all_by_scores(
    score: Callable[[UserBlock], Callable[[slice], Tensor]],
    n_items: int,
    sequences: Mapping[str, np.ndarray],
    k: int,
    filter_seen: bool,
) -> dict[str, np.ndarray]:
    """Rank all items for all held-out users by scores that are no product of embeddings.

    Args:
        score: Maps a block of users, on the CPU, to what gives the scores of some of them, as
            ``rank_scores`` asks for them.
        n_items: Number of items that are scored.
        sequences: As for ``rank_all``, whose result this is.
        k: Length of the lists of top items.
        filter_seen: Whether to leave the items of a user's history out.

    Raises:
        ValueError: As for ``rank_all``.
    """
    cpu = torch.device("cpu")

    def rank(block: UserBlock) -> Ranking:
        size = len(block.targets), n_items
        return rank_scores(score(block), size, cpu, block.targets, block.seen, k)

    return _rank_blocks(rank, n_items, cpu, sequences, filter_seen)


def _rank_blocks(
    rank: Callable[[UserBlock], Ranking],
    n_items: int,
    device: torch.device,
    sequences: Mapping[str, np.ndarray],
    filter_seen: bool,
) -> dict[str, np.ndarray]:
    if n_items != (expected := int(sequences["n_items"][0])):
        raise ValueError(
            f"the sequences are of {expected} items, but {n_items} have an embedding; "
            "train and evaluate on the same data"
        )
    from rich.progress import track  # noqa: PLC0415 - whoever only serves a model needs no rich

    blocks = UserBlocks(sequences, filter_seen).to(device)
    rankings = []
    for block in track(blocks, description="Ranking"):
        rankings.append(rank(block).cpu())  # all users' lists may be too long for the device
    ranking = join_rankings(rankings)
    return {
        "users": sequences["users"],
        "targets": sequences["targets"],
        "target_ranks": ranking.target_ranks.numpy(),
        "top_items": ranking.top_items.int().numpy(),
        "n_items": sequences["n_items"],
    }


def check_sizes(
    n_users: int,
    n_items: int,
    seen: tuple[Tensor, Tensor] | None,
    shard: Shard | None,
) -> None:
    """Check that users, items, what is left out and the shard fit together.

    Raises:
        ValueError: They do not.
    """
    if n_items == 0:
        raise ValueError("item_embeddings must hold a row or more, got none")
    if shard is not None and n_items > shard.largest:
        raise ValueError(
            f"shard.largest is {shard.largest} rows, but item_embeddings holds {n_items}"
        )
    if seen is not None and len(seen[1]) != n_users + 1:
        raise ValueError(f"{n_users} hidden states need {n_users + 1} offsets, got {len(seen[1])}")


def scorer(hidden: Tensor, item_embeddings: Tensor) -> Callable[[slice], Tensor]:
    """Return what scores all items for some users by products in float32."""
    table = item_embeddings.float()

    def score(users: slice) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return hidden[users].float() @ table.T

    return score


def score_blocks(
    score: Callable[[slice], Tensor],
    n_users: int,
    n_items: int,
    device: torch.device,
    seen: tuple[Tensor, Tensor] | None,
    shard: Shard | None,
    at_once: int,
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Score all items for as many users at once as make ``at_once`` scores, or fewer on a CPU.

    Yields:
        The users, their scores [users, n_items] with seen items left out, and whether they were
        finite before that, bool [users].
    """
    first_item, largest = (shard.first_item, shard.largest) if shard else (0, n_items)
    users_at_once = max(1, at_once // largest)
    if device.type == "cpu":
        in_cache = SCORES_AT_ONCE_ON_CPU // largest
        users_at_once = min(users_at_once, max(USERS_AT_ONCE_ON_CPU, in_cache))
    starts = range(0, n_users, users_at_once)
    left_out = cut_seen(seen, [*starts, n_users], device) if seen else None
    for block, start in enumerate(starts):
        users = slice(start, start + users_at_once)
        scores = score(users)
        least, greatest = scores.aminmax(dim=1)
        finite = least.isfinite() & greatest.isfinite()
        if left_out:
            rows, items = left_out[block]
            _leave_out(scores, rows, items - first_item, shard)
        yield users, scores, finite


def cut_seen(
    seen: tuple[Tensor, Tensor], cuts: list[int], device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """Cut the items to leave out into those of users from one cut to the next.

    Returns:
        For each of these: the rows of the scores, counted from the cut, and the items.
    """
    items, offsets = seen
    bounds = offsets[cuts].tolist()
    if bounds[0] != 0 or bounds[-1] != len(items):
        raise ValueError(
            f"the offsets of seen items must run from 0 to {len(items)}, the number of items, "
            f"got {bounds[0]} to {bounds[-1]}"
        )
    lengths = offsets.diff().to(device, non_blocking=True)
    rows = torch.repeat_interleave(lengths, output_size=len(items))
    return [
        (rows[start:stop] - first_user, items[start:stop])
        for first_user, (start, stop) in zip(cuts, pairwise(bounds), strict=False)
    ]


def seen_by(
    seen: tuple[Tensor, Tensor] | None, users: slice | Tensor
) -> tuple[Tensor, Tensor] | None:
    """Pick the items to leave out of some users, in the order in which these are given.

    Args:
        seen: Items and offsets, these on the CPU, of all users; None leaves out nothing.
        users: Rows of these users, a slice or int64 on the CPU.

    Returns:
        Items and offsets of the users alone, or None.
    """
    if seen is None:
        return None
    items, offsets = seen
    lengths = offsets.diff()[users]
    cut = F.pad(lengths.cumsum(0), (1, 0))
    shifts = torch.repeat_interleave(offsets[:-1][users] - cut[:-1], lengths)
    return items[(torch.arange(len(shifts)) + shifts).to(items.device)], cut


def _leave_out(scores: Tensor, rows: Tensor, items: Tensor, shard: Shard | None) -> None:
    """Put seen items, numbered from the first of the shard, below all others."""
    if shard is None:
        scores.index_put_((rows, items), scores.new_full((), LEFT_OUT))
        return
    # What is elsewhere has to go somewhere without changing it: to pick out the rest would wait.
    n_items = scores.shape[1]
    here = (items >= 0) & (items < n_items)
    places = rows * n_items + items.clamp(0, n_items - 1)
    scores.view(-1).scatter_reduce_(0, places, torch.where(here, LEFT_OUT, torch.inf), "amin")


def _rank_targets(
    scores: Tensor, targets: Tensor, finite: Tensor, shard: Shard | None
) -> tuple[Tensor, Tensor]:
    """Rank targets, numbered from the first item of the shard, by scores [users, n_items].

    Returns:
        Their ranks, int64 [users], and which users' scores are finite on all ranks.
    """
    n_items = scores.shape[1]
    targets = targets[:, None]
    if shard is None:
        target_scores = scores.gather(1, targets)
    else:
        target_scores = scores.gather(1, targets.clamp(0, n_items - 1))
        target_scores.masked_fill_((targets < 0) | (targets >= n_items), LEFT_OUT)
        shard.greatest(target_scores)
    ahead = scores == target_scores
    ahead &= torch.arange(n_items, device=scores.device) < targets
    ahead |= scores > target_scores
    # A sum of bools first turns all of them into the type of the sum.
    counts = torch.stack([ahead.sum(dim=1, dtype=torch.int32), ~finite])
    if shard is not None:
        shard.total(counts)
    ranks = (1 + counts[0].long()).masked_fill_(target_scores[:, 0] == LEFT_OUT, NEVER_RANKED)
    return ranks, counts[1] == 0


def first_items(scores: Tensor, k: int, shard: Shard | None) -> tuple[Tensor, Tensor]:
    """Find the first k items by scores [users, n_items] of the shard.

    Returns:
        Their ids, int64 [users, k], and scores [users, k].
    """
    n_items = scores.shape[1]
    width = min(k, n_items)
    # One place more than asked for tells whether equal scores contest the last one: topk may give
    # that to any of them, also to the wrong zero, as -0 is less than 0 to it.
    values, items = _largest(scores, min(k + 1, n_items))
    contested = (values[:, width - 1 : width] == values[:, width:]).any(dim=1)
    items = items[:, :width]
    rows = contested.nonzero()[:, 0]  # waits for the device
    for some in filter(len, rows.split(max(1, SCORES_AT_ONCE // n_items))):
        items[some] = _keys(scores[some]).topk(width, dim=1).indices
    values = scores.gather(1, items).add_(0.0)  # makes -0 into 0, which sort may tell apart
    items = F.pad(items, (0, k - width))
    values = F.pad(values, (0, k - width), value=LEFT_OUT)
    if shard is not None:
        items, values = shard.gather(items + shard.first_item), shard.gather(values)
    items, by_id = items.sort(dim=1)
    values, by_score = values.gather(1, by_id).sort(dim=1, descending=True, stable=True)
    items = items.gather(1, by_score).masked_fill_(values == LEFT_OUT, NO_ITEM)
    return items[:, :k], values[:, :k]


def _largest(scores: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Find the n largest scores of each row, and their columns; equal ones in any order.

    They are in the n groups of columns with the largest maxima, or equal to one in these, and
    in the columns after the last whole group.
    """
    n_columns = scores.shape[1]
    n_groups = n_columns // _GROUP
    if n_groups < _GROUPS_TO_SPARE * n:
        return scores.topk(n, dim=1)
    maxima = scores[:, : n_groups * _GROUP].unflatten(1, (n_groups, _GROUP)).amax(dim=2)
    groups = maxima.topk(n, dim=1).indices
    place = torch.arange(_GROUP, device=scores.device)
    rest = torch.arange(n_groups * _GROUP, n_columns, device=scores.device)
    columns = (groups[:, :, None] * _GROUP + place).flatten(1)
    columns = torch.cat([columns, rest.expand(len(scores), -1)], dim=1)
    values, places = scores.gather(1, columns).topk(n, dim=1)
    return values, columns.gather(1, places)


def _keys(scores: Tensor) -> Tensor:
    """Turn scores into distinct integers, int64 [users, n_items], in the order of the items.

    The scores are overwritten.
    """
    # Floats compare as their bits do, once the bits of negative ones are turned around; adding 0
    # makes -0 into 0. The score then takes the upper half of the key, the id the lower.
    bits = scores.add_(0.0).view(torch.int32)
    bits ^= (bits >> 31) & torch.iinfo(torch.int32).max
    return bits.long().mul_(2**32).sub_(torch.arange(scores.shape[1], device=scores.device))
