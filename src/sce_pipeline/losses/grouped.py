"""Losses over negatives that a group of tokens shares, in memory that does not grow with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from sce_pipeline.losses.base import chunks, matmul, scaled, target_logits
from sce_pipeline.losses.implementation import compute_dtype


class Groups(NamedTuple):
    """Which tokens meet which negatives.

    A negative that is a token's target is none for this token.

    Attributes:
        items: int64 [groups, n_negatives]; -1 where there is no negative.
        offsets: int64 [groups + 1], non-decreasing from 0; group ``g`` owns the tokens from
            ``offsets[g]`` up to ``offsets[g + 1]``, or up to the last there is. One number stands
            for groups that own so many tokens each.
        log_weights: float32 [groups, n_negatives], added to the negatives' logits; -inf makes it
            no negative.
        log_masses: Floating [tokens]; the log of how many items a token's negatives stand for.
            Where given, each of its V negatives is counted mass / V times. One number stands for
            that of all tokens.
    """

    items: Tensor
    offsets: Tensor | int
    log_weights: Tensor | None = None
    log_masses: Tensor | float | None = None


def grouped_cross_entropy(
    hidden: Tensor, item_embeddings: Tensor, targets: Tensor, groups: Groups, *, triton: bool
) -> Tensor:
    """Return the mean over tokens of ``logsumexp(target and negatives' logits) - target logit``.

    Args:
        hidden: [tokens, d].
        item_embeddings: [n_items, d].
        targets: int64 [tokens].
        groups: The negatives.
        triton: Whether the Triton kernels compute it. Their gradient of the table is added up in
            an order that changes from run to run.

    Returns:
        A scalar, in float32 or, for float64 arguments, in float64.
    """
    dtype = compute_dtype(hidden, item_embeddings)
    return _GroupedLoss.apply(hidden, item_embeddings, targets, groups, None, dtype, triton)


def grouped_binary_cross_entropy(
    hidden: Tensor,
    item_embeddings: Tensor,
    targets: Tensor,
    groups: Groups,
    *,
    beta: float,
    triton: bool,
) -> Tensor:
    """Return the mean over tokens of ``-(β·log σ(target) + Σ log σ(-negative)) / (1 + n)``.

    The arguments are those of ``grouped_cross_entropy``, with the exponent β of gBCE, 1 for BCE;
    ``log_masses`` have no meaning here.
    """
    dtype = compute_dtype(hidden, item_embeddings)
    groups = groups._replace(log_masses=None)
    return _GroupedLoss.apply(hidden, item_embeddings, targets, groups, beta, dtype, triton)


class _GroupedLoss(torch.autograd.Function):
    """The mean loss; binary with a ``beta``, products of factors rounded to ``dtype``."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        item_embeddings: Tensor,
        targets: Tensor,
        groups: Groups,
        beta: float | None,
        dtype: torch.dtype,
        triton: bool,
    ) -> Tensor:
        run, ctx.run_backward = _implementation(triton)
        ctx.options = {"beta": beta, "dtype": dtype}
        ctx.n_terms = 1 if beta is None else 1 + groups.items.shape[1]
        arguments = (hidden.contiguous(), item_embeddings.contiguous(), targets.contiguous())
        fields: Any = (each.contiguous() if isinstance(each, Tensor) else each for each in groups)
        groups = Groups(*fields)
        ctx.groups = groups._replace(log_masses=None)
        losses, *results = run(*arguments, groups, **ctx.options)
        ctx.save_for_backward(*arguments, *results)
        mean = losses.mean()
        return mean if beta is None else mean / ctx.n_terms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, item_embeddings, targets, grad_hidden, shares, log_sums = ctx.saved_tensors
        scale = grad / (len(hidden) * ctx.n_terms)
        grad_table = None
        if ctx.needs_input_grad[1]:
            grad_table = ctx.run_backward(
                scale,
                hidden,
                item_embeddings,
                targets,
                ctx.groups,
                shares,
                log_sums,
                **ctx.options,
            ).to(item_embeddings.dtype)
        grad_hidden = scaled(grad_hidden, scale, hidden.dtype)
        return grad_hidden, grad_table, None, None, None, None, None


def _implementation(triton: bool) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return the forward and the backward, which take and return the same either way."""
    if triton:
        # Triton is not needed where no kernel runs.
        from sce_pipeline.losses.kernels import grouped

        return grouped.forward, grouped.backward
    return _forward, _backward


def _forward(
    hidden: Tensor,
    item_embeddings: Tensor,
    targets: Tensor,
    groups: Groups,
    *,
    beta: float | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what ``kernels.grouped.forward`` does."""
    tiles = _Tiles.of(groups, hidden)
    positive = target_logits(hidden, item_embeddings, targets)
    of_tiles, grad_of_tiles, valid_of_tiles = [], [], []
    for tile in tiles.chunks(groups.items.shape[1], hidden.shape[1]):
        logits, _, keys = _logits(tile, hidden, item_embeddings, targets, groups, dtype)
        if beta is None:
            valid_of_tiles.append((~logits.isneginf()).sum(2))
            total = logits.logsumexp(2)
            factors = (logits - total.nan_to_num(neginf=0)[:, :, None]).exp()
        else:
            total, factors = functional.softplus(logits).sum(2), logits.sigmoid()
        of_tiles.append(total)
        grad_of_tiles.append(matmul(factors, keys))
    total = torch.cat(of_tiles).flatten()[tiles.row]
    grad_hidden = torch.cat(grad_of_tiles).flatten(0, 1)[tiles.row]
    if beta is None:
        correction = torch.zeros_like(total)
        if groups.log_masses is not None:
            n_valid = torch.cat(valid_of_tiles).flatten()[tiles.row]
            correction -= n_valid.clamp(min=1).to(total.dtype).log()
            correction += groups.log_masses
        # Of the odds against the target, as logsumexp(all) - positive would cancel where it has
        # nearly all of the sum.
        log_odds = total + correction - positive
        losses, shares = functional.softplus(log_odds), log_odds.sigmoid()
        log_sums = positive + losses - correction
        grad_hidden *= shares[:, None]
    else:
        losses = beta * functional.softplus(-positive) + total
        shares = beta * (-positive).sigmoid()
        log_sums = torch.empty_like(losses)
    grad_hidden -= shares[:, None] * functional.embedding(targets, item_embeddings)
    return losses, grad_hidden, shares, log_sums


def _backward(
    scale: Tensor,
    hidden: Tensor,
    item_embeddings: Tensor,
    targets: Tensor,
    groups: Groups,
    shares: Tensor,
    log_sums: Tensor,
    *,
    beta: float | None,
    dtype: torch.dtype,
) -> Tensor:
    """Return what ``kernels.grouped.backward`` does."""
    tiles = _Tiles.of(groups, hidden)
    grad_table = torch.zeros_like(item_embeddings, dtype=shares.dtype)
    for tile in tiles.chunks(groups.items.shape[1], hidden.shape[1]):
        logits, queries, _ = _logits(tile, hidden, item_embeddings, targets, groups, dtype)
        if beta is None:
            factors = (logits - log_sums[tile.token][:, :, None]).exp()
        else:
            factors = logits.sigmoid()
        factors = factors.masked_fill(~tile.is_token[:, :, None], 0)
        grad_keys = matmul(factors.mT, queries)
        rows = groups.items[tile.owner].clamp(min=0).flatten()
        grad_table.index_add_(0, rows, grad_keys.flatten(0, 1))
    grad_table.index_add_(0, targets, -shares[:, None] * hidden)
    return grad_table.mul_(scale)


class _Tiles(NamedTuple):
    """Tokens cut into tiles of equally many rows, each group starting a tile of its own.

    Attributes:
        owner: int64 [n_tiles]; the group of each tile.
        token: int64 [n_tiles, n_rows]; the token of each row, any where there is none.
        is_token: bool [n_tiles, n_rows].
        row: int64 [tokens]; where each token is among all rows.
    """

    owner: Tensor
    token: Tensor
    is_token: Tensor
    row: Tensor

    @classmethod
    def of(cls, groups: Groups, hidden: Tensor) -> _Tiles:
        """Lay out the tokens of groups, however ragged, without asking the device."""
        n_tokens, d = hidden.shape
        n_groups, n_negatives = groups.items.shape
        offsets, device = groups.offsets, hidden.device
        every_group = torch.arange(n_groups + 1, device=device)
        # As many as the average group has tokens, if their logits are not too many for a chunk.
        n_rows = next(chunks(-(-n_tokens // n_groups), max(n_negatives, d), device)).stop
        if isinstance(offsets, int):
            tiles_of_group = -(-offsets // n_rows)
            n_tiles, first_tile = n_groups * tiles_of_group, every_group * tiles_of_group
            offsets = (every_group * offsets).clamp_(max=n_tokens)
        else:
            offsets = offsets.clamp(max=n_tokens)
            # It grows by at least the tiles of each group, and in all by at most two a group.
            n_tiles, first_tile = n_tokens // n_rows + n_groups, offsets // n_rows + every_group
        every_tile = torch.arange(n_tiles, device=device)
        every_token = torch.arange(n_tokens, device=device)
        owner = torch.searchsorted(first_tile[1:], every_tile, right=True)
        start = offsets[owner] + (every_tile - first_tile[owner]) * n_rows
        token = start[:, None] + torch.arange(n_rows, device=device)
        is_token = token < offsets[owner + 1, None]
        group = torch.searchsorted(offsets[1:], every_token, right=True)
        row = first_tile[group] * n_rows + every_token - offsets[group]
        return cls(owner, token.clamp_(max=n_tokens - 1), is_token, row)

    def chunks(self, n_negatives: int, d: int) -> Iterator[_Tiles]:
        """Cut the tiles into chunks whose logits and embeddings fit the device's chunk."""
        n_tiles, n_rows = self.token.shape
        elements = max(n_rows * n_negatives, (n_rows + n_negatives) * d)
        for chunk in chunks(n_tiles, elements, self.row.device):
            yield _Tiles(self.owner[chunk], self.token[chunk], self.is_token[chunk], self.row)


def _logits(
    tile: _Tiles,
    hidden: Tensor,
    item_embeddings: Tensor,
    targets: Tensor,
    groups: Groups,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits [n, rows, n_negatives], -inf where there is no negative, and their factors."""
    items = groups.items[tile.owner]
    accumulated = torch.promote_types(dtype, torch.float32)
    queries = hidden[tile.token].to(dtype).to(accumulated)
    keys = functional.embedding(items.clamp(min=0), item_embeddings).to(dtype).to(accumulated)
    logits = matmul(queries, keys.mT)
    if groups.log_weights is not None:
        logits += groups.log_weights[tile.owner, None]
    is_target = items[:, None] == targets[tile.token][:, :, None]
    return logits.masked_fill_(is_target | (items < 0)[:, None], -torch.inf), queries, keys
