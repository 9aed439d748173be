"""RECE: cross-entropy over the items whose random bucket lies near the token's."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from sce_pipeline.losses.base import (
    Histories,
    Loss,
    at_least_float32,
    chunks,
    scaled,
    target_logits,
)
from sce_pipeline.losses.implementation import Implementation, compute_dtype, takes_triton


class Meetings(NamedTuple):
    """Which tokens meet which items, round by round.

    In a round, a token of chunk a meets an item of chunk b if |a - b| <= n_extra_chunks. Chunk j
    holds positions ⌊j·n/n_chunks⌋ up to ⌊(j + 1)·n/n_chunks⌋ of the round's order of n things.

    Attributes:
        token_order: Tokens in the order of each round, int32 [rounds, tokens].
        item_order: Items in the order of each round, int32 [rounds, n_items].
        token_chunks: The chunk of each token in each round, int16 or int32 [tokens, rounds].
        item_chunks: The chunk of each item in each round, int16 or int32 [n_items, rounds].
        n_chunks: Number of chunks.
        n_extra_chunks: Chunks met on either side.
    """

    token_order: Tensor
    item_order: Tensor
    token_chunks: Tensor
    item_chunks: Tensor
    n_chunks: int
    n_extra_chunks: int

    @property
    def most_items(self) -> int:
        """The most items that a chunk of tokens meets in a round."""
        n_items = self.item_order.shape[1]
        return -(-min(1 + 2 * self.n_extra_chunks, self.n_chunks) * n_items // self.n_chunks)

    def items_met(self, round_: int, chunk: Tensor) -> tuple[Tensor, Tensor]:
        """Return the items that chunks of tokens, int64 [n], meet in a round.

        Returns:
            Items, int64 [n, most_items], and which of them are such: chunks that meet fewer are
            filled up with anything.
        """
        n_chunks, n_extra, n_items = self.n_chunks, self.n_extra_chunks, self.item_order.shape[1]
        return _between(
            (chunk - n_extra).clamp(min=0) * n_items // n_chunks,
            (chunk + n_extra + 1).clamp(max=n_chunks) * n_items // n_chunks,
            self.item_order[round_],
            self.most_items,
        )


class RECE(Loss):
    """RECE (Gusak et al., 2024, arXiv 2408.02354).

    In each round random directions are drawn, and each token and each item falls into the bucket of
    the direction of largest inner product. Tokens and items are sorted by bucket and cut into as
    many chunks, all of one size but for one; a token's negatives are the items of the chunk with
    its number and of ``n_extra_chunks`` on either side. A token's loss is the cross-entropy of its
    target among the negatives of all rounds. Its target is never one of them.

    The paper lets a chunk hold several buckets, and uses one for each, as is done here. More
    buckets than tokens or items are clamped, and a warning is logged once.

    Args:
        n_buckets: Buckets, and chunks, of a round; ``auto`` is the paper's
            2·√((1 + 2·n_extra_chunks)·min(n_items, tokens)), rounded down.
        n_extra_chunks: Chunks of items on either side that a chunk of tokens meets.
        n_rounds: Rounds, each with directions of its own.
        duplicate_correction: Whether a negative that is met in several rounds counts once in all;
            the paper subtracts the logarithm of their number from its logit in each.
        impl: Which implementation computes a batch.
    """

    def __init__(
        self,
        *,
        n_buckets: int | Literal["auto"],
        n_extra_chunks: int,
        n_rounds: int,
        duplicate_correction: bool,
        impl: Implementation = "auto",
    ) -> None:
        super().__init__()
        self.n_buckets = n_buckets
        self.n_extra_chunks = n_extra_chunks
        self.n_rounds = n_rounds
        self.duplicate_correction = duplicate_correction
        self.impl = impl

    def _mean_loss(
        self,
        hidden: Tensor,
        item_embeddings: Tensor,
        targets: Tensor,
        sequence: Tensor,
        histories: Histories,
    ) -> Tensor:
        triton = self._takes_triton(hidden, item_embeddings)
        cross_entropy = _fused_cross_entropy if triton else chunked_cross_entropy
        return cross_entropy(
            hidden,
            item_embeddings,
            targets,
            self.draw_meetings(hidden, item_embeddings),
            duplicate_correction=self.duplicate_correction,
        )

    def draw_meetings(self, hidden: Tensor, item_embeddings: Tensor) -> Meetings:
        """Draw who meets whom of hidden states [tokens, d] and a table [n_items, d]."""
        return draw_meetings(
            hidden,
            item_embeddings,
            n_chunks=self._n_chunks(min(len(hidden), len(item_embeddings))),
            n_extra_chunks=self.n_extra_chunks,
            n_rounds=self.n_rounds,
            triton=self._takes_triton(hidden, item_embeddings),
        )

    def _takes_triton(self, hidden: Tensor, item_embeddings: Tensor) -> bool:
        return takes_triton(self.impl, hidden, item_embeddings, deterministic=True)

    def _n_chunks(self, largest: int) -> int:
        if self.n_buckets == "auto":
            return min(math.isqrt(4 * (1 + 2 * self.n_extra_chunks) * largest), largest)
        if self.n_buckets > largest:
            self._warn_once(
                "RECE has n_buckets = %d, more than the %d tokens or items there are: "
                "each has a chunk of its own",
                self.n_buckets,
                largest,
            )
        return min(self.n_buckets, largest)


@torch.no_grad()
def draw_meetings(
    hidden: Tensor,
    item_embeddings: Tensor,
    *,
    n_chunks: int,
    n_extra_chunks: int,
    n_rounds: int,
    triton: bool = False,
) -> Meetings:
    """Draw directions, ``n_chunks`` a round, and cut tokens and items into chunks.

    Neither the inner products [rounds, n_chunks, n_items] nor those of one round stand whole.

    Args:
        hidden: [tokens, d].
        item_embeddings: [n_items, d].
        n_chunks: Number of chunks.
        n_extra_chunks: Chunks met on either side.
        n_rounds: Number of rounds.
        triton: Whether the kernels find the buckets.
    """
    dtype = compute_dtype(hidden, item_embeddings)
    directions = torch.randn(n_rounds, n_chunks, hidden.shape[1], device=hidden.device)
    nearest = _fused_nearest if triton else _nearest
    token_order, token_chunks = _cut(nearest(hidden, directions, dtype), n_chunks)
    item_order, item_chunks = _cut(nearest(item_embeddings, directions, dtype), n_chunks)
    return Meetings(token_order, item_order, token_chunks, item_chunks, n_chunks, n_extra_chunks)


def _nearest(rows: Tensor, directions: Tensor, dtype: torch.dtype) -> Tensor:
    """Return which direction of each round is nearest to each row, int64 [rounds, n]."""
    n_rounds, n_directions, _ = directions.shape
    nearest = torch.empty(n_rounds, len(rows), dtype=torch.int64, device=rows.device)
    for chunk in chunks(len(rows), n_directions, rows.device):
        for round_ in range(n_rounds):
            products = rows[chunk].to(dtype) @ directions[round_].to(dtype).T
            nearest[round_, chunk] = products.argmax(1)
    return nearest


def _fused_nearest(rows: Tensor, directions: Tensor, dtype: torch.dtype) -> Tensor:
    from sce_pipeline.losses.kernels.projections import nearest_projections

    return nearest_projections(rows, directions, dtype)


def _cut(buckets: Tensor, n_chunks: int) -> tuple[Tensor, Tensor]:
    """Return the order of each round and the chunks of ``Meetings``, given buckets [rounds, n]."""
    n_rounds, n = buckets.shape
    number = torch.int16 if n_chunks < 2**15 else torch.int32
    # Position p lies in chunk ((p + 1)·n_chunks - 1) // n.
    dividends = torch.arange(n_chunks - 1, (n + 1) * n_chunks - 1, n_chunks, device=buckets.device)
    chunk_at = (dividends // n).to(number)
    orders = torch.empty(n_rounds, n, dtype=torch.int32, device=buckets.device)
    chunk_of = torch.empty(n, n_rounds, dtype=number, device=buckets.device)
    for rounds in chunks(n_rounds, n, buckets.device):
        order = buckets[rounds].sort(dim=1, stable=True).indices
        orders[rounds] = order
        chunk_of.T[rounds].scatter_(1, order, chunk_at.expand_as(order))
    return orders, chunk_of


def chunked_cross_entropy(
    hidden: Tensor,
    item_embeddings: Tensor,
    targets: Tensor,
    meetings: Meetings,
    *,
    duplicate_correction: bool,
) -> Tensor:
    """Return the mean cross-entropy of each token's target among the negatives it meets.

    The logits are made a few chunks at a time, and anew in the backward.

    Args:
        hidden: [tokens, d].
        item_embeddings: [n_items, d].
        targets: int64 [tokens].
        meetings: Who meets whom.
        duplicate_correction: Whether a negative met in several rounds counts once.
    """
    negatives = _NegativeLogSum.apply(
        hidden, item_embeddings, targets, meetings, duplicate_correction
    )
    # With m = negatives - positive, the loss is log(1 + exp(m)); nothing cancels where m is low.
    positives = target_logits(hidden, item_embeddings, targets)
    return -functional.logsigmoid(positives - negatives).mean()


class _NegativeLogSum(torch.autograd.Function):
    """logsumexp of the logits of each token's negatives, [tokens]; -inf where there are none."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        item_embeddings: Tensor,
        targets: Tensor,
        meetings: Meetings,
        duplicate_correction: bool,
    ) -> Tensor:
        dtype = compute_dtype(hidden, item_embeddings)
        arguments = (hidden, item_embeddings, targets, meetings, dtype, duplicate_correction)
        # The last one is of the tokens that tiles are filled up with.
        log_sums = at_least_float32(hidden.new_full((len(hidden) + 1,), -torch.inf))
        for tile in _tiles(*arguments):
            log_sum = tile.logits.logsumexp(2)
            log_sums[tile.tokens] = torch.logaddexp(log_sums[tile.tokens], log_sum)
        ctx.arguments = (meetings, dtype, duplicate_correction)
        ctx.save_for_backward(hidden, item_embeddings, targets, log_sums)
        return log_sums[:-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        hidden, item_embeddings, targets, log_sums = ctx.saved_tensors
        grad = functional.pad(grad, (0, 1))
        grad_hidden = torch.zeros(
            len(hidden) + 1, hidden.shape[1], dtype=grad.dtype, device=grad.device
        )
        grad_table = torch.zeros_like(item_embeddings, dtype=grad.dtype)
        for tile in _tiles(hidden, item_embeddings, targets, *ctx.arguments):
            weights = (tile.logits - log_sums[tile.tokens, None]).exp() * grad[tile.tokens, None]
            weights = torch.where(tile.logits.isneginf(), 0, weights)
            grad_hidden[tile.tokens] += weights @ tile.w.to(grad.dtype)
            grad_items = weights.mT @ tile.x.to(grad.dtype)
            grad_table.index_add_(0, tile.items.flatten(), grad_items.flatten(0, 1))
        return (
            grad_hidden[:-1].to(hidden.dtype),
            grad_table.to(item_embeddings.dtype),
            None,
            None,
            None,
        )


class _Tile(NamedTuple):
    """Some tokens of some chunks of one round, beside all items these meet.

    Attributes:
        tokens: int64 [n, a]; the number of tokens there are, where a chunk has fewer than a.
        items: int64 [n, b].
        x: Hidden states, [n, a, d].
        w: Item embeddings, [n, b, d].
        logits: [n, a, b], -inf for what is no negative or counts in an earlier round.
    """

    tokens: Tensor
    items: Tensor
    x: Tensor
    w: Tensor
    logits: Tensor


def _tiles(
    hidden: Tensor,
    item_embeddings: Tensor,
    targets: Tensor,
    meetings: Meetings,
    dtype: torch.dtype,
    duplicate_correction: bool,
) -> Iterator[_Tile]:
    """Go over all pairs that meet, in tiles of bounded size, round by round."""
    device, (n_tokens, d) = hidden.device, hidden.shape
    n_chunks, n_extra, n_columns = meetings.n_chunks, meetings.n_extra_chunks, meetings.most_items
    # A chunk is cut into parts where its logits would be too many for one tile.
    n_parts = len(list(chunks(-(-n_tokens // n_chunks), n_columns, device)))
    n_all = n_chunks * n_parts
    n_rows = -(-n_tokens // n_all)
    for round_ in range(len(meetings.token_order)):
        for numbers in chunks(n_all, n_columns * max(n_rows, d), device):
            part = torch.arange(numbers.start, numbers.stop, device=device)
            tokens, token_live = _between(
                part * n_tokens // n_all,
                (part + 1) * n_tokens // n_all,
                meetings.token_order[round_],
                n_rows,
            )
            items, item_live = meetings.items_met(round_, part // n_parts)
            x, w = hidden[tokens].to(dtype), item_embeddings[items].to(dtype)
            negative = token_live[:, :, None] & item_live[:, None, :]
            negative &= targets[tokens][:, :, None] != items[:, None, :]
            for earlier in range(round_ if duplicate_correction else 0):
                token_chunk = meetings.token_chunks[tokens, earlier]
                item_chunk = meetings.item_chunks[items, earlier]
                distance = (token_chunk[:, :, None] - item_chunk[:, None, :]).abs()
                negative &= distance > n_extra
            logits = at_least_float32(x @ w.mT).masked_fill_(~negative, -torch.inf)
            yield _Tile(torch.where(token_live, tokens, n_tokens), items, x, w, logits)


def _between(start: Tensor, stop: Tensor, order: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return what stands in ``order`` from each start to before its stop, and which are such.

    Rows shorter than ``width`` are filled up with anything.
    """
    position = start[:, None] + torch.arange(width, device=start.device)
    live = position < stop[:, None]
    return order[position.clamp_(max=len(order) - 1)].long(), live


def _fused_cross_entropy(
    hidden: Tensor,
    item_embeddings: Tensor,
    targets: Tensor,
    meetings: Meetings,
    *,
    duplicate_correction: bool,
) -> Tensor:
    return _FusedCrossEntropy.apply(
        hidden, item_embeddings, targets, meetings, duplicate_correction
    )


class _FusedCrossEntropy(torch.autograd.Function):
    """``chunked_cross_entropy`` in Triton; the gradient of the hidden states comes with it."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        item_embeddings: Tensor,
        targets: Tensor,
        meetings: Meetings,
        duplicate_correction: bool,
    ) -> Tensor:
        from sce_pipeline.losses.kernels.rece import token_sums

        hidden, item_embeddings = hidden.contiguous(), item_embeddings.contiguous()
        targets = targets.contiguous()
        dtype = compute_dtype(hidden, item_embeddings)
        sums = token_sums(
            hidden,
            item_embeddings,
            targets,
            meetings,
            duplicate_correction=duplicate_correction,
            dtype=dtype,
        )
        ctx.sizes = meetings[4:]
        ctx.options = (duplicate_correction, dtype)
        ctx.save_for_backward(hidden, item_embeddings, targets, *meetings[:4], *sums)
        return functional.softplus(sums.margins).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        from sce_pipeline.losses.kernels.rece import Sums, table_gradient

        hidden, item_embeddings, targets, *rest = ctx.saved_tensors
        meetings, sums = Meetings(*rest[:4], *ctx.sizes), Sums(*rest[4:])
        duplicate_correction, dtype = ctx.options
        scale = grad / len(hidden)
        grad_hidden = grad_table = None
        if ctx.needs_input_grad[0]:
            grad_hidden = scaled(sums.hidden_gradient, scale, hidden.dtype)
        if ctx.needs_input_grad[1]:
            grad_table = table_gradient(
                hidden,
                item_embeddings,
                targets,
                meetings,
                sums,
                scale,
                duplicate_correction=duplicate_correction,
                dtype=dtype,
            )
        return grad_hidden, grad_table, None, None, None
