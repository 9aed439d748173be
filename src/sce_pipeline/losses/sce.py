"""SCE: cross-entropy over the hardest items of random buckets."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from sce_pipeline.losses.base import Histories, Loss, at_least_float32, chunks, target_logits
from sce_pipeline.losses.implementation import Implementation, compute_dtype, takes_triton


class Buckets(NamedTuple):
    """Which tokens meet which items.

    Attributes:
        tokens: int64 [n_buckets, bucket_size_x], distinct within a bucket.
        items: int64 [n_buckets, bucket_size_y], distinct within a bucket.
    """

    tokens: Tensor
    items: Tensor


class SCE(Loss):
    """SCE (Mezentsev et al., 2024, arXiv 2409.18721).

    Random centres are drawn, and each gathers in its bucket the tokens and the items of largest
    inner product with it. Within a bucket each token has the cross-entropy of its target among the
    bucket's items. A token in several buckets keeps its largest loss: negatives of different
    buckets are not pooled. A token in no bucket is left out of the mean and gets no gradient.

    Sizes beyond the tokens of a batch or the catalogue are clamped, and a warning is logged once.

    Args:
        n_buckets: Number of buckets; ``auto`` is 2·√tokens, rounded down.
        bucket_size_x: Tokens in a bucket; ``auto`` likewise.
        bucket_size_y: Items in a bucket.
        mix_x: Draw the centres as random mixtures of the hidden states, ``Ωᵀ X`` with normal Ω,
            rather than normal themselves.
        impl: What computes it; see ``implementation``. The Triton kernels choose the buckets
            without their inner products and never hold logits; their sums have no fixed order.
    """

    def __init__(
        self,
        *,
        n_buckets: int | Literal["auto"],
        bucket_size_x: int | Literal["auto"],
        bucket_size_y: int,
        mix_x: bool,
        impl: Implementation = "auto",
    ) -> None:
        super().__init__()
        self.n_buckets = n_buckets
        self.bucket_size_x = bucket_size_x
        self.bucket_size_y = bucket_size_y
        self.mix_x = mix_x
        self.impl = impl

    def _mean_loss(
        self,
        hidden: Tensor,
        item_embeddings: Tensor,
        targets: Tensor,
        sequence: Tensor,
        histories: Histories,
    ) -> Tensor:
        buckets = self.draw_buckets(hidden, item_embeddings)
        if self._takes_triton(hidden, item_embeddings):
            return fused_bucketed_cross_entropy(hidden, item_embeddings, targets, buckets)
        return bucketed_cross_entropy(hidden, item_embeddings, targets, buckets)

    def draw_buckets(self, hidden: Tensor, item_embeddings: Tensor) -> Buckets:
        """Draw the buckets of a batch of hidden states [tokens, d] and a table [n_items, d]."""
        n_tokens, n_items = len(hidden), len(item_embeddings)
        auto = math.isqrt(4 * n_tokens)
        triton = self._takes_triton(hidden, item_embeddings)
        return (draw_buckets_fused if triton else draw_buckets)(
            hidden,
            item_embeddings,
            n_buckets=auto if self.n_buckets == "auto" else self.n_buckets,
            bucket_size_x=(
                min(auto, n_tokens)
                if self.bucket_size_x == "auto"
                else self._clamped("bucket_size_x", self.bucket_size_x, n_tokens, "tokens")
            ),
            bucket_size_y=self._clamped("bucket_size_y", self.bucket_size_y, n_items, "items"),
            mix_x=self.mix_x,
        )

    def _takes_triton(self, hidden: Tensor, item_embeddings: Tensor) -> bool:
        return takes_triton(self.impl, hidden, item_embeddings, deterministic=False)

    def _clamped(self, name: str, size: int, largest: int, what: str) -> int:
        if size > largest:
            self._warn_once(
                f"SCE has {name} = %d, more than the %d {what} there are: all of them are taken",
                size,
                largest,
            )
        return min(size, largest)


@torch.no_grad()
def draw_buckets(
    hidden: Tensor,
    item_embeddings: Tensor,
    *,
    n_buckets: int,
    bucket_size_x: int,
    bucket_size_y: int,
    mix_x: bool,
) -> Buckets:
    """Draw centres and fill their buckets, few at a time.

    Neither the inner products [n_buckets, tokens] and [n_buckets, n_items] nor the mixture
    [n_buckets, tokens] ever stand whole. A centre's length is of no matter to what is nearest.

    Args:
        hidden: [tokens, d].
        item_embeddings: [n_items, d].
        n_buckets: Number of buckets.
        bucket_size_x: Tokens in a bucket, at most all.
        bucket_size_y: Items in a bucket, at most all.
        mix_x: Whether the centres are mixtures of the hidden states.
    """
    tokens, items = [], []
    largest = max(len(hidden), len(item_embeddings))
    for chunk in chunks(n_buckets, largest, hidden.device):
        centres = draw_centres(chunk.stop - chunk.start, hidden, mix_x=mix_x)
        tokens.append((centres @ hidden.T).topk(bucket_size_x, sorted=False).indices)
        items.append((centres @ item_embeddings.T).topk(bucket_size_y, sorted=False).indices)
    return Buckets(torch.cat(tokens), torch.cat(items))


@torch.no_grad()
def draw_buckets_fused(
    hidden: Tensor,
    item_embeddings: Tensor,
    *,
    n_buckets: int,
    bucket_size_x: int,
    bucket_size_y: int,
    mix_x: bool,
) -> Buckets:
    """Return what ``draw_buckets`` does, through the Triton kernels."""
    from sce_pipeline.losses.kernels.nearest import Rows, nearest_rows

    centres = draw_centres(n_buckets, hidden, mix_x=mix_x)
    centres = centres.to(compute_dtype(hidden, item_embeddings))
    searches = Rows(hidden, bucket_size_x), Rows(item_embeddings, bucket_size_y)
    return Buckets(*nearest_rows(centres, *searches))


def draw_centres(n_centres: int, hidden: Tensor, *, mix_x: bool) -> Tensor:
    """Return random centres, [n_centres, d], mixtures of the hidden states few at a time."""
    n_tokens, d = hidden.shape
    if not mix_x:
        return torch.randn(n_centres, d, dtype=hidden.dtype, device=hidden.device)
    mixtures = []
    for chunk in chunks(n_centres, n_tokens, hidden.device):
        shape = (chunk.stop - chunk.start, n_tokens)
        # Divided by √tokens, a mixture is as long as a hidden state, which float16 can hold.
        omega = torch.randn(*shape, dtype=hidden.dtype, device=hidden.device)
        mixtures.append(omega.div_(math.sqrt(n_tokens)) @ hidden)
    return torch.cat(mixtures)


def bucketed_cross_entropy(
    hidden: Tensor, item_embeddings: Tensor, targets: Tensor, buckets: Buckets
) -> Tensor:
    """Return the mean, over the tokens in a bucket, of their largest cross-entropy in one.

    Where buckets tie, they share the gradient alike. The logits [n_buckets, bucket_size_x,
    bucket_size_y] are made anew in the backward, few buckets at a time; what stands whole is the
    hidden states and embeddings of the buckets, [n_buckets, bucket_size_x + bucket_size_y, d].

    Args:
        hidden: [tokens, d].
        item_embeddings: [n_items, d].
        targets: int64 [tokens].
        buckets: The tokens and items of each bucket; at least one of each.
    """
    bucket_hidden = functional.embedding(buckets.tokens, hidden)
    bucket_items = functional.embedding(buckets.items, item_embeddings)
    bucket_targets = targets[buckets.tokens]
    positives = target_logits(hidden, item_embeddings, targets)
    bucket_positives = functional.embedding(buckets.tokens, positives[:, None]).squeeze(2)
    n_buckets, bucket_size_x = buckets.tokens.shape
    bucket_size_y = buckets.items.shape[1]
    losses = torch.cat(
        [
            checkpoint(
                _cross_entropies,
                bucket_hidden[chunk],
                bucket_items[chunk],
                buckets.items[chunk],
                bucket_targets[chunk],
                bucket_positives[chunk],
                use_reentrant=False,
                preserve_rng_state=False,
            )
            for chunk in chunks(n_buckets, bucket_size_x * bucket_size_y, hidden.device)
        ]
    )
    uncovered = losses.new_full((len(hidden),), -torch.inf)
    largest = uncovered.scatter_reduce(0, buckets.tokens.flatten(), losses.flatten(), "amax")
    covered = ~largest.isneginf()
    return torch.where(covered, largest, 0).sum() / covered.sum()


def _cross_entropies(
    hidden: Tensor, item_embeddings: Tensor, items: Tensor, targets: Tensor, positives: Tensor
) -> Tensor:
    """Return the cross-entropy of each token of each bucket, [n, x].

    Args:
        hidden: The tokens' hidden states, [n, x, d].
        item_embeddings: The items' embeddings, [n, y, d].
        items: int64 [n, y].
        targets: int64 [n, x].
        positives: The logits of the targets, [n, x].
    """
    logits = at_least_float32(hidden @ item_embeddings.mT)
    logits = logits.masked_fill(items[:, None, :] == targets[:, :, None], -torch.inf)
    logits = torch.cat([positives[:, :, None], logits], dim=2).flatten(0, 1)
    first = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    return functional.cross_entropy(logits, first, reduction="none").view_as(positives)


def fused_bucketed_cross_entropy(
    hidden: Tensor, item_embeddings: Tensor, targets: Tensor, buckets: Buckets
) -> Tensor:
    """Return what ``bucketed_cross_entropy`` does, through the Triton kernels.

    Of buckets that tie, one has the whole gradient, a subgradient as good as that of their mean.
    """
    dtype = compute_dtype(hidden, item_embeddings)
    return _FusedBuckets.apply(hidden, item_embeddings, targets, *buckets, dtype)


class _FusedBuckets(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        item_embeddings: Tensor,
        targets: Tensor,
        bucket_tokens: Tensor,
        bucket_items: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        from sce_pipeline.losses.kernels.buckets import find_winners

        hidden, item_embeddings = hidden.contiguous(), item_embeddings.contiguous()
        targets, bucket_items = targets.contiguous(), bucket_items.contiguous()
        mean, winners = find_winners(
            hidden, item_embeddings, targets, bucket_tokens.contiguous(), bucket_items, dtype
        )
        ctx.save_for_backward(hidden, item_embeddings, targets, bucket_items, *winners)
        ctx.dtype = dtype
        return mean

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from sce_pipeline.losses.kernels.buckets import Winners, gradients

        hidden, item_embeddings, targets, bucket_items, *winners = ctx.saved_tensors
        both = gradients(
            hidden, item_embeddings, targets, bucket_items, Winners(*winners), grad, ctx.dtype
        )
        return *both, None, None, None, None
