"""Negatives drawn uniformly from the catalogue, on the device, without a rejection loop."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sce_pipeline.losses.base import Histories
from sce_pipeline.losses.grouped import Groups
from sce_pipeline.losses.sampling import draw

Shared = Literal["token", "sequence", "batch"]
Exclude = Literal["history", "target"]


class Negatives(NamedTuple):
    """A draw of negatives, with replacement.

    Attributes:
        items: int64 [groups, n_negatives]; a group is a token, a sequence or the batch.
        rejected: bool [tokens, n_negatives]; the draws that are no negatives of the token, because
            they are excluded for it or because nothing is left to draw.
        n_candidates: int64 [tokens]; how many items of the catalogue are not excluded.
    """

    items: Tensor
    rejected: Tensor
    n_candidates: Tensor


def draw_negatives(
    targets: Tensor,
    sequence: Tensor,
    histories: Histories,
    *,
    n_items: int,
    n_negatives: int,
    shared: Shared,
    exclude: Exclude,
) -> Negatives:
    """Draw ``n_negatives`` items per token, per sequence or for the whole batch.

    The valid draws of a token are independent and uniform over its candidates, the items that are
    not excluded. Where all who share a draw exclude the same history, its items are never drawn.
    Elsewhere the draw is from the whole catalogue, and what a token excludes is rejected for it.
    Draws per token that exclude the target are those of ``sampling.draw``.

    Args:
        targets: int64 [tokens].
        sequence: int64 [tokens].
        histories: Read with ``exclude="history"``, and for its length with ``shared="sequence"``.
        n_items: Size of the catalogue.
        n_negatives: Draws in each group.
        shared: Who shares a draw.
        exclude: What is no negative: the items of the user's history or only the token's target.
    """
    items = _draw_items(targets, sequence, histories, n_items, n_negatives, shared, exclude)
    if exclude == "history":
        n_candidates = (n_items - histories.offsets.diff())[sequence]
    else:
        n_candidates = torch.full_like(targets, n_items - 1)
    if exclude == "history" and shared == "batch":
        rejected = _in_histories(items[0], histories, n_items)[sequence]
    elif exclude == "target":
        rejected = (items[sequence] if shared == "sequence" else items) == targets[:, None]
    else:
        rejected = n_candidates[:, None] == 0
    return Negatives(items, rejected.expand(len(targets), n_negatives), n_candidates)


def draw_groups(
    targets: Tensor,
    sequence: Tensor,
    histories: Histories,
    *,
    n_items: int,
    n_negatives: int,
    shared: Literal["sequence", "batch"],
    exclude: Exclude,
) -> Groups:
    """Draw as ``draw_negatives``, and say nothing token by token: that would take memory.

    A draw for the whole batch cannot exclude histories here. The arguments are those of
    ``draw_negatives``.
    """
    items = _draw_items(targets, sequence, histories, n_items, n_negatives, shared, exclude)
    device = targets.device
    if shared == "batch":
        offsets = torch.arange(0, len(targets) + 1, len(targets), device=device)
    else:
        offsets = torch.searchsorted(sequence, torch.arange(len(items) + 1, device=device))
    if exclude == "history":
        n_candidates = n_items - histories.offsets.diff()
        items = items.masked_fill(n_candidates[:, None] == 0, -1)
        return Groups(items, offsets, log_masses=n_candidates.log()[sequence])
    # In a catalogue of one item there are no candidates, and all draws are rejected.
    log_mass = math.log(max(n_items - 1, 1))
    return Groups(items, offsets, log_masses=torch.full(targets.shape, log_mass, device=device))


def _draw_items(
    targets: Tensor,
    sequence: Tensor,
    histories: Histories,
    n_items: int,
    n_negatives: int,
    shared: Shared,
    exclude: Exclude,
) -> Tensor:
    """Return the draws of each group, int64 [groups, n_negatives]."""
    n_sequences, device = len(histories.offsets) - 1, targets.device
    if exclude == "history" and shared != "batch":
        owners = sequence if shared == "token" else torch.arange(n_sequences, device=device)
        return draw_complement(owners, histories, n_items, n_negatives)
    if exclude == "target" and shared == "token":
        drawn = draw(len(targets), n_items, n_negatives, device, with_coins=False)
        return drawn.items(0, len(targets))
    n_groups = {"token": len(targets), "sequence": n_sequences, "batch": 1}[shared]
    return torch.randint(n_items, (n_groups, n_negatives), device=device)


def draw_complement(owners: Tensor, histories: Histories, n_items: int, n_negatives: int) -> Tensor:
    """Draw uniformly from the items outside a history, exactly and with one binary search a draw.

    Let e_0 < e_1 < ... be the m items of a history. The r-th item outside it, counted from 0, is
    r + #{j: e_j - j <= r}, since e_j - j items outside the history lie below e_j. So r is drawn
    from 0 to n_items - m - 1, and the histories, laid end to end as keys that increase from one
    sequence to the next, are searched all at once.

    Args:
        owners: int64 [groups]; the sequence whose history each group of draws excludes.
        histories: Their items.
        n_items: Size of the catalogue.
        n_negatives: Draws in each group.

    Returns:
        int64 [groups, n_negatives]. Items of the catalogue, meaningless where a history has it all.
    """
    owner_of_item = _owners(histories)
    starts = histories.offsets[owner_of_item]
    position = torch.arange(len(histories.items), device=owners.device) - starts
    # A sequence's e_j - j and r are at most n_items: sequences cannot meet, and 10^5 sequences of
    # 10^7 items stay far below 2^63.
    keys = owner_of_item * (n_items + 1) + histories.items - position

    n_candidates = (n_items - histories.offsets.diff())[owners, None]
    # The remainder favours small numbers by less than n_items / 2^62, so by nothing.
    ranks = torch.randint(2**62, (len(owners), n_negatives), device=owners.device)
    ranks.remainder_(n_candidates.clamp(min=1))
    found = torch.searchsorted(keys, owners[:, None] * (n_items + 1) + ranks, right=True)
    return ranks.add_(found).sub_(histories.offsets[owners, None]).clamp_(max=n_items - 1)


def _in_histories(items: Tensor, histories: Histories, n_items: int) -> Tensor:
    """Return whether each item lies in each history, bool [n_sequences, items]."""
    n_sequences = len(histories.offsets) - 1
    keys = _owners(histories) * n_items + histories.items
    queries = torch.arange(n_sequences, device=items.device)[:, None] * n_items + items
    return torch.searchsorted(keys, queries, right=True) > torch.searchsorted(keys, queries)


def _owners(histories: Histories) -> Tensor:
    """Return the sequence of each item of the histories, int64 [total]."""
    lengths = histories.offsets.diff()
    sequences = torch.arange(len(lengths), device=lengths.device)
    return sequences.repeat_interleave(lengths, output_size=len(histories.items))
