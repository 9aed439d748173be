"""Losses over negatives that each token has of its own, in memory that does not grow with them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from sce_pipeline.losses.base import at_least_float32, chunks, matmul, scaled, target_logits
from sce_pipeline.losses.sampling import Draw, Popularity


class _Options(NamedTuple):
    """What the losses differ in: the draw, the correction and, for binary ones, the exponent β."""

    draw: Draw
    popularity: Popularity | None
    corrected: bool
    beta: float | None
    triton: bool


def per_token_cross_entropy(
    hidden: Tensor,
    item_embeddings: Tensor,
    targets: Tensor,
    draw: Draw,
    *,
    popularity: Popularity | None = None,
    log_correction: bool,
    triton: bool,
) -> Tensor:
    """Return the mean over tokens of ``logsumexp(target and negatives' logits) - target logit``.

    A draw that is the token's target is no negative. With ``log_correction`` the negatives stand
    for all items but the target. Let Z be the sum of exp(s_c) over these, for logits s_c, and q_c
    the chance of item c in a draw. A draw that is not the target y has the chances q_c / (1 - q_y),
    so exp(s_c) · (1 - q_y) / q_c has the mean Z, wherever q_c > 0. So has the mean over the V valid
    draws, given V, as they are independent. It is the sum of their exp(s_c + correction) with

        correction = log((1 - q_y) / (V · q_c)),

    which for uniform draws, q_c = 1/n, is log((n - 1) / V). Only a token left with V = 0 estimates
    Z by 0.

    The Triton kernels give the same bits every time.

    Args:
        hidden: [tokens, d].
        item_embeddings: [n_items, d].
        targets: int64 [tokens].
        draw: The negatives of each token.
        popularity: Where given, the chances of items in a draw; else they are drawn uniformly.
        log_correction: Whether negatives stand for all items, or only for themselves.
        triton: Whether the Triton kernels compute it.

    Returns:
        A scalar, in float32 or, for float64 arguments, in float64. It is computed in that
        precision under autocast as well: no product of matrices would gain from less.
    """
    options = _Options(draw, popularity, log_correction, None, triton)
    return _PerTokenLoss.apply(hidden, item_embeddings, targets, options)


def per_token_binary_cross_entropy(
    hidden: Tensor,
    item_embeddings: Tensor,
    targets: Tensor,
    draw: Draw,
    *,
    beta: float,
    triton: bool,
) -> Tensor:
    """Return the mean over tokens of ``-(β·log σ(target) + Σ log σ(-negative)) / (1 + n)``.

    The arguments are those of ``per_token_cross_entropy``, with the exponent β of gBCE, 1 for BCE;
    n counts all draws, of which one that is the target gives 0.
    """
    options = _Options(draw, None, False, beta, triton)
    return _PerTokenLoss.apply(hidden, item_embeddings, targets, options)


class _PerTokenLoss(torch.autograd.Function):
    """The mean loss; the hidden states' gradient comes with it, the table's is gathered after."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, item_embeddings: Tensor, targets: Tensor, options: _Options
    ) -> Tensor:
        arguments = (hidden.contiguous(), item_embeddings.contiguous(), targets.contiguous())
        ctx.options = options
        ctx.n_terms = 1 if options.beta is None else 1 + options.draw.n_negatives
        run = _triton_forward if options.triton else _torch_forward
        losses, *saved = run(*arguments, options, ctx.needs_input_grad[0])
        ctx.save_for_backward(*arguments, *saved)
        mean = losses.mean()
        return mean if options.beta is None else mean / ctx.n_terms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, item_embeddings, targets, grad_hidden, shares, log_sums = ctx.saved_tensors
        scale = grad / (len(hidden) * ctx.n_terms)
        if grad_hidden is not None:
            grad_hidden = scaled(grad_hidden, scale, hidden.dtype)
        grad_table = None
        if ctx.needs_input_grad[1]:
            run = _triton_backward if ctx.options.triton else _torch_backward
            grad_table = run(scale, hidden, item_embeddings, targets, ctx.options, shares, log_sums)
        return grad_hidden, grad_table, None, None


def _triton_forward(
    hidden: Tensor,
    item_embeddings: Tensor,
    targets: Tensor,
    options: _Options,
    with_gradient: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    from sce_pipeline.losses.kernels import sampled

    return sampled.forward(
        hidden,
        item_embeddings,
        targets,
        options.draw,
        options.popularity,
        corrected=options.corrected,
        beta=options.beta,
        with_gradient=with_gradient,
    )


def _triton_backward(
    scale: Tensor,
    hidden: Tensor,
    item_embeddings: Tensor,
    targets: Tensor,
    options: _Options,
    shares: Tensor,
    log_sums: Tensor,
) -> Tensor:
    from sce_pipeline.losses.kernels import sampled

    return sampled.backward(
        scale,
        hidden,
        item_embeddings,
        targets,
        options.draw,
        options.popularity,
        shares,
        log_sums,
        corrected=options.corrected,
        binary=options.beta is not None,
    )


def _torch_forward(
    hidden: Tensor,
    item_embeddings: Tensor,
    targets: Tensor,
    options: _Options,
    with_gradient: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Return what ``kernels.sampled.forward`` does, few tokens at a time."""
    parts = []
    for chunk in _chunks(hidden, options):
        _, keys, logits = _logits(chunk, hidden, item_embeddings, targets, options)
        positive = target_logits(hidden[chunk], item_embeddings, targets[chunk])
        if options.beta is None:
            correction = _token_correction(logits, targets[chunk], options)
            total = logits.logsumexp(1)
            # Of the odds against the target, as logsumexp(all) - positive would cancel where it
            # has nearly all of the sum.
            log_odds = total + correction - positive
            losses, shares = -functional.logsigmoid(-log_odds), log_odds.sigmoid()
            log_sums = positive + losses - correction
            factors = (logits - torch.where(total.isneginf(), 0, total)[:, None]).exp() * shares[
                :, None
            ]
        else:
            losses = -options.beta * functional.logsigmoid(positive)
            losses -= functional.logsigmoid(-logits).sum(1)
            log_sums = shares = options.beta * (-positive).sigmoid()
            factors = logits.sigmoid()
        grad_hidden = None
        if with_gradient:
            grad_hidden = matmul(factors[:, None], keys)[:, 0]
            grad_hidden -= shares[:, None] * functional.embedding(targets[chunk], item_embeddings)
        parts.append((losses, grad_hidden, shares, log_sums))
    columns = zip(*parts, strict=True)
    return tuple(None if column[0] is None else torch.cat(column) for column in columns)  # type: ignore[return-value]


def _torch_backward(
    scale: Tensor,
    hidden: Tensor,
    item_embeddings: Tensor,
    targets: Tensor,
    options: _Options,
    shares: Tensor,
    log_sums: Tensor,
) -> Tensor:
    """Return what ``kernels.sampled.backward`` does, few tokens at a time."""
    grad_table = torch.zeros_like(item_embeddings, dtype=shares.dtype)
    for chunk in _chunks(hidden, options):
        items, _, logits = _logits(chunk, hidden, item_embeddings, targets, options)
        if options.beta is None:
            factors = (logits - log_sums[chunk, None]).exp()
        else:
            factors = logits.sigmoid()
        grad_keys = factors[:, :, None] * at_least_float32(hidden[chunk])[:, None]
        grad_table.index_add_(0, items.flatten(), grad_keys.flatten(0, 1))
    grad_table.index_add_(0, targets, -shares[:, None] * hidden)
    return grad_table.mul_(scale).to(item_embeddings.dtype)


def _logits(
    chunk: slice,
    hidden: Tensor,
    item_embeddings: Tensor,
    targets: Tensor,
    options: _Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the negatives of some tokens, their embeddings and logits, -inf where rejected.

    What a correction adds to the logits of each negative by itself is in them.
    """
    items = options.draw.items(chunk.start, chunk.stop, options.popularity)
    keys = at_least_float32(functional.embedding(items, item_embeddings))
    logits = matmul(keys, at_least_float32(hidden[chunk])[:, :, None])[:, :, 0]
    if options.corrected and options.popularity is not None:
        logits -= options.popularity.log_chances[items]
    return items, keys, logits.masked_fill_(items == targets[chunk, None], -torch.inf)


def _token_correction(logits: Tensor, targets: Tensor, options: _Options) -> Tensor:
    """Return what the correction adds to the logits of all the negatives of a token, [tokens]."""
    if not options.corrected:
        return logits.new_zeros(len(logits))
    n_valid = (~logits.isneginf()).sum(1).clamp(min=1).to(logits.dtype)
    if options.popularity is not None:
        return options.popularity.log_rests[targets].to(logits.dtype) - n_valid.log()
    return (max(options.draw.n_items - 1, 1) / n_valid).log()


def _chunks(hidden: Tensor, options: _Options) -> Iterator[slice]:
    n_tokens, d = hidden.shape
    return chunks(n_tokens, options.draw.n_negatives * d, hidden.device)
