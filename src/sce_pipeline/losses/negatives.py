"""Negatives drawn uniformly from the catalogue, on the device, without a rejection loop."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from sce_pipeline.losses.base import Histories
from sce_pipeline.losses.grouped import Groups

Shared = Literal["token", "sequence", "batch"]
Exclude = Literal["history", "target"]


def draw_groups(
    targets: Tensor,
    sequence: Tensor,
    histories: Histories,
    *,
    n_items: int,
    n_negatives: int,
    shared: Shared,
    exclude: Exclude,
) -> Groups:
    """Draw ``n_negatives`` items per token, per sequence or for the whole batch.

    The valid draws of a token are independent and uniform over its candidates, the items that are
    not excluded. Where all who share a draw exclude the same history, its items are never drawn.
    Elsewhere the draw is from the whole catalogue, and what a token excludes is rejected for it: a
    group that meets its target does so, and sequences that share the batch's draw are groups of
    their own, without what is in their histories.

    Args:
        targets: int64 [tokens].
        sequence: int64 [tokens].
        histories: Read with ``exclude="history"``, and for its length with ``shared="sequence"``.
        n_items: Size of the catalogue.
        n_negatives: Draws in each group.
        shared: Who shares a draw.
        exclude: What is no negative: the items of the user's history or only the token's target.

    Returns:
        Groups whose masses are the numbers of candidates.
    """
    n_tokens, device = len(targets), targets.device
    if exclude == "target":
        n_groups = {"token": n_tokens, "sequence": len(histories.offsets) - 1, "batch": 1}[shared]
        items = torch.randint(n_items, (n_groups, n_negatives), device=device)
        size = _offsets(sequence, n_groups) if shared == "sequence" else n_tokens // n_groups
        # In a catalogue of one item there are no candidates, and all draws are rejected.
        return Groups(items, size, log_masses=math.log(max(n_items - 1, 1)))
    n_candidates = n_items - histories.offsets.diff()
    log_masses = n_candidates.double().log()[sequence]
    if shared == "batch":
        items = torch.randint(n_items, (n_negatives,), device=device)
        items = torch.where(_in_histories(items, histories, n_items), -1, items)
    else:
        owners = sequence if shared == "token" else torch.arange(len(n_candidates), device=device)
        items = draw_complement(owners, histories, n_items, n_negatives)
        items.masked_fill_((n_candidates == 0)[owners, None], -1)
    size = 1 if shared == "token" else _offsets(sequence, len(n_candidates))
    return Groups(items, size, log_masses=log_masses)


def _offsets(sequence: Tensor, n_sequences: int) -> Tensor:
    """Return the first token of each sequence and that after the last, int64 [n_sequences + 1]."""
    return torch.searchsorted(sequence, torch.arange(n_sequences + 1, device=sequence.device))


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
