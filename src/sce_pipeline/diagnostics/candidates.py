"""Which items each loss compares a token with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sce_pipeline.losses import CCE, CE, RECE, SCE, CCEMinus, Histories, Loss
from sce_pipeline.losses.base import NO_HISTORIES, chunks
from sce_pipeline.losses.grouped import Groups
from sce_pipeline.losses.rece import Meetings
from sce_pipeline.losses.sampled import SampledLoss
from sce_pipeline.losses.sampling import Draw, Popularity
from sce_pipeline.losses.sce import Buckets


class Candidates(NamedTuple):
    """Sets of items, and which tokens are compared with which of them.

    A token's target may be in its sets, though no loss takes it for a negative.

    Attributes:
        tokens: The token of each pair, int64 [pairs], non-decreasing.
        sets: Its set, int64 [pairs].
        items: The items of each set, int64 [sets, largest]; -1 where there is none.
        pooled: Whether a token's negatives are the items of all its sets together. Otherwise its
            loss is the largest of those in its sets, each by itself, and a set's items are
            distinct.
    """

    tokens: Tensor
    sets: Tensor
    items: Tensor
    pooled: bool

    @classmethod
    def of_buckets(cls, buckets: Buckets) -> Candidates:
        """Return the candidates that SCE's buckets give each token: a set for each bucket."""
        n_buckets, bucket_size_x = buckets.tokens.shape
        bucket = torch.arange(n_buckets, device=buckets.tokens.device)
        tokens, order = buckets.tokens.flatten().sort(stable=True)
        sets = bucket.repeat_interleave(bucket_size_x, output_size=len(order))[order]
        return cls(tokens, sets, buckets.items, pooled=False)

    @classmethod
    def of_meetings(cls, meetings: Meetings) -> Candidates:
        """Return the candidates of RECE's chunks: a set for each chunk of each round."""
        n_tokens, n_rounds = meetings.token_chunks.shape
        device = meetings.token_chunks.device
        chunk = torch.arange(meetings.n_chunks, device=device)
        items = []
        for round_ in range(n_rounds):
            met, live = meetings.items_met(round_, chunk)
            items.append(met.masked_fill(~live, -1))
        round_starts = torch.arange(n_rounds, device=device) * meetings.n_chunks
        tokens = torch.arange(n_tokens, device=device).repeat_interleave(n_rounds)
        sets = (meetings.token_chunks + round_starts).flatten()
        return cls(tokens, sets, torch.cat(items), pooled=True)

    def covered(self, n_tokens: int) -> Tensor:
        """Return which of the tokens have a set, bool [n_tokens]."""
        covered = torch.zeros(n_tokens, dtype=torch.bool, device=self.tokens.device)
        covered[self.tokens] = True
        return covered

    def within(self, tokens: slice) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the pairs of some tokens, few at a time.

        Yields:
            The place of each pair's token among them, int64 [n], and its items, int64 [n, largest].
        """
        bounds = torch.tensor([tokens.start, tokens.stop], device=self.tokens.device)
        first, last = torch.searchsorted(self.tokens, bounds).tolist()
        for chunk in chunks(last - first, self.items.shape[1], self.items.device):
            pairs = slice(first + chunk.start, first + chunk.stop)
            yield self.tokens[pairs] - tokens.start, self.items[self.sets[pairs]]


def find_candidates(
    loss: Loss,
    hidden: Tensor,
    item_embeddings: Tensor,
    targets: Tensor,
    sequence: Tensor,
    histories: Histories | None,
) -> Candidates:
    """Draw what ``loss`` would compare each token with, as it would be drawn by ``Loss.forward``.

    The draw takes as many random numbers as the loss does, so that after the same seed, on the same
    device, the loss is of these candidates.

    The arguments are those of ``Loss.forward``.

    Raises:
        TypeError: Nothing is known of what such a loss compares.
        ValueError: The loss needs ``histories``, but they are ``None``.
    """
    if loss.needs_histories and histories is None:
        raise ValueError(f"{type(loss).__name__} needs histories here, got None")
    n_items = len(item_embeddings)
    if isinstance(loss, SCE):
        return Candidates.of_buckets(loss.draw_buckets(hidden, item_embeddings))
    if isinstance(loss, RECE):
        return Candidates.of_meetings(loss.draw_meetings(hidden, item_embeddings))
    if isinstance(loss, CCEMinus):
        return _of_negatives(loss.draw_negatives(targets, n_items), targets, loss.popularity)
    if isinstance(loss, SampledLoss):
        drawn = loss.draw_negatives(targets, sequence, histories or NO_HISTORIES, n_items)
        return _of_negatives(drawn, targets)
    if isinstance(loss, CE | CCE):
        tokens = torch.arange(len(hidden), device=hidden.device)
        catalogue = torch.arange(n_items, device=hidden.device)[None]
        return Candidates(tokens, torch.zeros_like(tokens), catalogue, pooled=True)
    raise TypeError(f"it is not known what a loss of type {type(loss).__name__} compares")


def shuffle_items(meetings: Meetings) -> Meetings:
    """Deal the items out anew over the places of each round, at random and evenly.

    Every token meets as many items as before, but any: what RECE's choice of chunks is held
    against.
    """
    item_order = meetings.item_order.long()
    order = torch.rand(item_order.shape, device=item_order.device).argsort(1)
    chunk_at = meetings.item_chunks.T.gather(1, item_order)
    item_chunks = torch.empty_like(chunk_at).scatter_(1, order, chunk_at).T.contiguous()
    return meetings._replace(item_order=order.int(), item_chunks=item_chunks)


def _of_negatives(
    drawn: Draw | Groups, targets: Tensor, popularity: Popularity | None = None
) -> Candidates:
    tokens = torch.arange(len(targets), device=targets.device)
    if isinstance(drawn, Draw):
        items = drawn.items(0, len(targets), popularity)
        return Candidates(tokens, tokens, items, pooled=True)
    if isinstance(drawn.offsets, int):
        groups = tokens // drawn.offsets
    else:
        groups = torch.searchsorted(drawn.offsets[1:], tokens, right=True)
    return Candidates(tokens, groups, drawn.items, pooled=True)
