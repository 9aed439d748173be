"""The first items of each user by groups of items, on a GPU.

Scores never stand whole. A kernel takes all products on the tensor cores, with factors rounded to
bfloat16, and keeps the largest in each group of items. By how much rounding may have moved it is
known, and with that which groups may hold one of a user's first items: a few more than the list is
long. Only in these is every item scored, in float32, so that the lists are those of all scores in
float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from sce_pipeline.evaluation.ranking import (
    LEFT_OUT,
    NO_ITEM,
    TopItems,
    cut_seen,
    first_items,
    seen_by,
)
from sce_pipeline.evaluation.top_items import SCORES_AT_ONCE, find_among_all
from sce_pipeline.losses.kernels.group_maxima import GROUP, group_maxima, products_of_groups

NUMBERS_FOR_A_GROUP = 8
"""As many numbers of four bytes, or a few more, are held for a user and a group."""

NUMBERS_AT_ONCE = 2**24
"""Most numbers of embeddings gathered at once to score what users have seen: three times 64 MiB."""

MOST_GROUPS = 1 / 8
"""Where more of a block's groups may hold one of the first items, they are no help."""

HUGE = torch.finfo(torch.float32).max / 4
"""From here on scores, or what is added to them, might not be finite."""

LEAST_NORM = 2.0**-50
"""Taken for all norms below it: the square of a small one would be 0 in float32."""


@torch.no_grad()
def find_by_groups(
    hidden: Tensor,
    item_embeddings: Tensor,
    seen: tuple[Tensor, Tensor] | None,
    k: int,
    excluded: Tensor | None = None,
) -> TopItems:
    """Do what ``find_top_items`` does by the groups of items in which the first may be.

    A user counts as one of finite scores if the product of the norms of hidden state and item
    embedding, by which no score can be larger, is no huge number for any item, as computed in
    float32. Where groups are no help, all scores of a block of users are taken.
    """
    catalogue = _Catalogue.of(item_embeddings, excluded)
    top = TopItems.none(len(hidden), k, hidden.device)
    at_once = max(1, SCORES_AT_ONCE // (NUMBERS_FOR_A_GROUP * len(catalogue.error)))
    starts = range(0, len(hidden), at_once)
    left_out = cut_seen(seen, [*starts, len(hidden)], hidden.device) if seen else None
    for block, start in enumerate(starts):
        users = slice(start, start + at_once)
        states = hidden[users].float().contiguous()
        norms = _norms(states)
        top.finite[users] = norms * catalogue.largest_norm < HUGE
        chosen = _choose_groups(catalogue, states, norms, left_out[block] if left_out else None, k)
        counts = chosen.sum(dim=1)
        widest, total = torch.stack([counts.amax(), counts.sum()]).tolist()  # waits for the device
        if total > MOST_GROUPS * chosen.numel():
            found = find_among_all(states, catalogue.table, seen_by(seen, users), k, excluded)
            top.items[users], top.scores[users] = found.items, found.scores
            continue
        top.items[users], top.scores[users] = _search(
            catalogue, states, chosen, widest, left_out[block] if left_out else None, k
        )
    return top


def _norms(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1).clamp(min=LEAST_NORM)


@dataclass(frozen=True)
class _Catalogue:
    """The item table, as it is searched.

    Attributes:
        table: float32 [n_items, d].
        centre: The mean item, float32 [d]. A hidden state's product with it moves all scores of a
            user alike.
        rounded: The table less the mean item, whose products are smaller and so are the errors of
            rounding them, in bfloat16.
        bias: What is added to the scores of an item: 0, or -inf where it is left out for
            everybody, as are those that fill up the last group; float32 [groups * GROUP].
        error: By how much the product of a hidden state of norm 1 with a row of ``rounded`` may be
            off, the most in each group, float32 [groups].
        largest_norm: That of the items, [].
    """

    table: Tensor
    centre: Tensor
    rounded: Tensor
    bias: Tensor
    error: Tensor
    largest_norm: Tensor

    @classmethod
    def of(cls, item_embeddings: Tensor, excluded: Tensor | None) -> _Catalogue:
        table = item_embeddings.float().contiguous()
        missing = -len(table) % GROUP
        bias = table.new_zeros(len(table))
        if excluded is not None:
            bias.masked_fill_(excluded, LEFT_OUT)
        centre = table.mean(dim=0)
        centred = table - centre
        norms = _norms(table)
        errors = F.pad(rounding_error(_norms(centred), norms, table.shape[1]), (0, missing))
        return cls(
            table,
            centre,
            centred.bfloat16(),
            F.pad(bias, (0, missing), value=LEFT_OUT),
            errors.unflatten(0, (-1, GROUP)).amax(dim=1),
            norms.amax(),
        )


def _search(
    catalogue: _Catalogue,
    states: Tensor,
    chosen: Tensor,
    widest: int,
    left_out: tuple[Tensor, Tensor] | None,
    k: int,
) -> tuple[Tensor, Tensor]:
    """Do what ``_rank_groups`` does, for few enough users at a time."""
    at_once = max(1, SCORES_AT_ONCE // (max(1, widest) * GROUP))
    found = [
        _rank_groups(
            catalogue,
            states[start : start + at_once],
            chosen[start : start + at_once],
            widest,
            None if left_out is None else (left_out[0] - start, left_out[1]),
            k,
        )
        for start in range(0, len(states), at_once)
    ]
    return torch.cat([items for items, _ in found]), torch.cat([scores for _, scores in found])


def _choose_groups(
    catalogue: _Catalogue,
    states: Tensor,
    norms: Tensor,
    left_out: tuple[Tensor, Tensor] | None,
    k: int,
) -> Tensor:
    """Tell in which groups the first items of each user may be, bool [users, groups].

    Where the item behind a maximum cannot be one that the user has seen, the maximum less its
    error is a score that an item of the group reaches. The k-th of these is a score that k items
    reach, and in a group whose maximum, with its error, is below that, there is none of the first.
    """
    maxima = group_maxima(states.bfloat16(), catalogue.rounded, catalogue.bias)
    error = catalogue.error[:, None] * norms
    reached = maxima - error
    if left_out is not None:
        users, items = left_out
        groups = items // GROUP
        scores = _score(states, catalogue.table, users, items)
        scores -= (states * catalogue.centre).sum(dim=1)[users]
        behind = torch.where(scores >= reached[groups, users], LEFT_OUT, torch.inf)
        places = groups * len(states) + users
        reached.view(-1).scatter_reduce_(0, places, behind, "amin")
    possible = maxima > LEFT_OUT
    if k <= len(reached):
        possible &= error.add_(maxima) >= reached.topk(k, dim=0).values[-1]
    return possible.T.contiguous()


def _score(states: Tensor, table: Tensor, users: Tensor, items: Tensor) -> Tensor:
    """Return the score of an item for each of some users, float32 [n], few at a time."""
    at_once = max(1, NUMBERS_AT_ONCE // states.shape[1])
    parts = zip(users.split(at_once), items.split(at_once), strict=True)
    return torch.cat([(states[user] * table[item]).sum(dim=1) for user, item in parts])


def rounding_error(centred_norms: Tensor, norms: Tensor, d: int) -> Tensor:
    """Return by how much products with states of norm 1 may be off, float32 [rows].

    Rounding to bfloat16 changes each factor by a share of up to 2^-8. A sum of d products in
    float32, of which some hardware keeps a bit or two less, is off by less than 2^-21 for each of
    them; that holds for the scores with which the maxima are compared, and for the mean item, too.
    The sum of the absolute products is at most the product of the norms.

    Args:
        centred_norms: Norms of the rows that are rounded, [rows].
        norms: Norms of the items, [rows].
        d: Columns of the table.
    """
    return centred_norms * (2**-7 + 2**-16) + (centred_norms + 3 * norms) * (d * 2**-21)


def _rank_groups(
    catalogue: _Catalogue,
    states: Tensor,
    chosen: Tensor,
    widest: int,
    left_out: tuple[Tensor, Tensor] | None,
    k: int,
) -> tuple[Tensor, Tensor]:
    """Find the first items of some users in their groups, and their scores: both [users, k].

    Args:
        catalogue: The items.
        states: float32 [users, d].
        chosen: Which groups, bool [users, groups].
        widest: Most groups of a user.
        left_out: Items to leave out: the users, counted from the first here, and the items; also
            of users who are not here.
        k: Length of the lists.
    """
    n_users = len(states)
    if widest == 0:
        top = TopItems.none(n_users, k, states.device)
        return top.items, top.scores
    user, group = chosen.nonzero(as_tuple=True)  # waits for the device
    counts = chosen.sum(dim=1)
    firsts = widest * torch.arange(n_users, device=states.device) - (counts.cumsum(0) - counts)
    slots = firsts[user] + torch.arange(len(user), device=states.device)
    scores = states.new_full((n_users * widest, GROUP), LEFT_OUT)
    products_of_groups(states, catalogue.table, catalogue.bias, (group, user), slots, scores)
    if left_out is not None:
        slot_of = torch.full(chosen.shape, -1, dtype=torch.int32, device=states.device)
        slot_of[user, group] = slots.int()
        _leave_out(scores, slot_of, *left_out)
    groups = torch.zeros(n_users * widest, dtype=torch.int64, device=states.device)
    groups[slots] = group
    columns, values = first_items(scores.view(n_users, -1), k, None)
    group = groups.view(n_users, widest).gather(1, columns.clamp(min=0) // GROUP)
    return torch.where(columns == NO_ITEM, NO_ITEM, group * GROUP + columns % GROUP), values


def _leave_out(scores: Tensor, slot_of: Tensor, users: Tensor, items: Tensor) -> None:
    """Put what users have seen below all other items.

    Args:
        scores: Those of the groups that were chosen, float32 [slots, GROUP].
        slot_of: Which slot holds a user's scores of a group, -1 where none does, [users, groups].
        users: Users, also such as are not here.
        items: An item for each of them.
    """
    # What is elsewhere has to go somewhere without changing it: to pick out the rest would wait.
    n_users = len(slot_of)
    slots = slot_of[users.clamp(0, n_users - 1), items // GROUP].long()
    here = (users >= 0) & (users < n_users) & (slots >= 0)
    behind = torch.where(here, LEFT_OUT, torch.inf)
    places = slots.clamp(min=0) * GROUP + items % GROUP
    scores.view(-1).scatter_reduce_(0, places, behind, "amin")
