"""CCE: exact cross-entropy over the whole catalogue, without its matrix of logits."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from sce_pipeline.losses.base import (
    Histories,
    Loss,
    at_least_float32,
    check_tensors,
    chunks,
    matmul,
    scaled,
)
from sce_pipeline.losses.cast_table import casts_whole
from sce_pipeline.losses.implementation import Implementation, compute_dtype, takes_triton
from sce_pipeline.losses.item_parts import Options, Shard, cross_entropy_in_parts

if TYPE_CHECKING:
    from sce_pipeline.losses.kernels.cce import Terms

LARGEST_FLOAT32 = 128
"""Largest d at which ``impl: auto`` always has the kernels take products of float32.

On an H100, with each product in three of TF32, they take a third of PyTorch's time at d = 64 but
1.7 times as long at d = 256 (25,600 tokens, 173,511 items).
"""

MOST_ITEMS = 2**20
"""Items up to which PyTorch takes such products of a larger d.

It goes through the table again for each chunk of tokens, and a chunk has the fewer the more items
there are: 32 at this number, where both are estimated to take about as long.
"""

SMALLEST_NORM = 1e-12
"""What a shorter embedding is divided by when it is normalised, as in PyTorch."""


class CCE(Loss):
    """CCE: the value and gradients of ``CE`` in the memory of the gradients (arXiv 2509.09682).

    Args:
        label_smoothing: ε of Szegedy et al., 2016: the target's share 1 - ε + ε / n_items, every
            other item's ε / n_items.
        z_loss: Factor of the squared logsumexp, which keeps it near 0 (Chowdhery et al., 2022).
        logit_scale: Factor of the inner products, an inverse temperature.
        logq_correction: Whether the log of an item's share of the training interactions is
            subtracted from its logit (Menon et al., 2021), which needs ``use_item_counts``; an item
            that occurs nowhere counts once. Ranking is by the inner products alone.
        skip_mass: Softmax mass of a token that may be left out of its gradients, in blocks of items
            that have next to none; 0 leaves out nothing. See ``cut_cross_entropy``.
        impl: Which implementation computes; see ``losses.implementation``. ``auto`` takes PyTorch
            on CUDA, too, for products of float32 where d > 128 and n_items <= 2**20.
    """

    def __init__(
        self,
        *,
        label_smoothing: float,
        z_loss: float,
        logit_scale: float,
        logq_correction: bool,
        skip_mass: float,
        impl: Implementation = "auto",
    ) -> None:
        super().__init__()
        self.needs_item_counts = logq_correction
        self.log_probability: Tensor | None
        self.register_buffer("log_probability", None, persistent=False)
        self.label_smoothing = label_smoothing
        self.z_loss = z_loss
        self.logit_scale = logit_scale
        self.skip_mass = skip_mass
        self.impl = impl

    def use_item_counts(self, counts: Tensor) -> None:
        """Correct by these counts from now on; to be called before the loss goes to its device."""
        counts = counts.clamp(min=1).double()
        self.log_probability = (counts / counts.sum()).log().float()

    def _mean_loss(
        self,
        hidden: Tensor,
        item_embeddings: Tensor,
        targets: Tensor,
        sequence: Tensor,
        histories: Histories,
    ) -> Tensor:
        if self.needs_item_counts and self.log_probability is None:
            raise RuntimeError(
                "cce with logq_correction needs to know how often each item occurs; "
                "call use_item_counts first"
            )
        return cut_cross_entropy(
            hidden,
            item_embeddings,
            targets,
            log_probability=self.log_probability,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            logit_scale=self.logit_scale,
            skip_mass=self.skip_mass,
            impl=self.impl,
        )


def cut_cross_entropy(
    hidden: Tensor,
    item_embeddings: Tensor,
    targets: Tensor,
    *,
    item_bias: Tensor | None = None,
    log_probability: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
    normalized: bool = False,
    skip_mass: float = 0.0,
    impl: Implementation = "auto",
) -> Tensor:
    """Return the mean over tokens of the cross-entropy over all items.

    With logits z = logit_scale·(x·w) + item_bias - log_probability and p their softmax, the loss of
    a token is ``(1 - ε)·(lse - z_target) + ε·(lse - mean z) + z_loss·lse²``. What stands whole are
    the gradients and, where autocast casts the table, its cast up to ``CAST_BYTES``; above that the
    kernels have ranges of it cast, unless it is ``normalized`` or ``item_bias`` is learned.

    ``skip_mass`` δ leaves a block of items out of the gradients of a block of tokens if none of
    these tokens has more than the block's equal share of δ, δ / blocks, of its softmax there. A
    token i thus loses at most δ of its softmax in each of the two gradients: that of its own loss
    is off by at most ``δ·logit_scale·max_c ‖w_c‖``, and those of the mean loss by the items'
    embeddings, summed over the items, by at most ``δ·logit_scale·mean_i ‖x_i‖`` (without z-loss,
    which multiplies both by ``max |1 + 2·z_loss·lse|``; where ``normalized``, these are bounds of
    the gradients by the normalised rows, and 1 stands for the norms). Value and lse stay exact.
    Only the kernels gain by it; PyTorch computes everything.

    Args:
        hidden: Hidden states x, floating [tokens, d].
        item_embeddings: The live table w, floating [n_items, d].
        targets: int64 [tokens]. On a CPU with ``impl: torch`` a target out of range is an
            ``IndexError``; elsewhere the loss is then NaN.
        item_bias: Added to each item's logit, floating [n_items]; it may be learned.
        log_probability: log q of each item, subtracted from its logit (Bengio & Senécal, 2008;
            Menon et al., 2021), finite, floating [n_items]; gets no gradient.
        label_smoothing: ε, at least 0 and under 1.
        z_loss: At least 0.
        logit_scale: A positive number.
        normalized: Whether hidden states and items are divided by their Euclidean norms.
        skip_mass: δ, at least 0 and under 1.
        impl: Which implementation computes; see ``CCE``.

    Returns:
        A scalar, in float32 or, for float64 arguments, in float64. No token gives 0.

    Raises:
        TypeError: The dtypes do not fit together.
        ValueError: Shapes, numbers or devices are not as said, or ``impl`` cannot compute them.
    """
    check_tensors(hidden, item_embeddings, targets=targets)
    for name, values in (("item_bias", item_bias), ("log_probability", log_probability)):
        if values is not None:
            check_per_item(name, values, item_embeddings)
    check_numbers(label_smoothing, z_loss, logit_scale, skip_mass)
    if not len(hidden):
        return at_least_float32(hidden.sum() + item_embeddings[:0].sum())
    bias = None if item_bias is None else at_least_float32(item_bias)
    if log_probability is not None:
        offset = at_least_float32(log_probability.detach())
        bias = -offset if bias is None else bias - offset
    options = (label_smoothing, z_loss, logit_scale)
    if bias is not None:
        bias = bias.contiguous()
    if decides_for_triton(impl, hidden, item_embeddings):
        dtype = compute_dtype(hidden, item_embeddings)
        is_learned = bias is not None and bias.requires_grad
        if not (casts_whole(item_embeddings, dtype) or normalized or is_learned):
            grad = torch.is_grad_enabled() and hidden.requires_grad
            return cross_entropy_in_parts(
                hidden,
                item_embeddings,
                bias,
                targets,
                Shard(0, len(item_embeddings), [len(hidden)], alone=True),
                Options(*options, skip_mass, triton=True, grad=grad),
            )
        return _TwoPasses.apply(
            hidden, item_embeddings, bias, targets, (*options, normalized, skip_mass)
        )
    if normalized:
        hidden = functional.normalize(hidden, dim=1, eps=SMALLEST_NORM)
        item_embeddings = functional.normalize(item_embeddings, dim=1, eps=SMALLEST_NORM)
    return _ChunkedCrossEntropy.apply(hidden, item_embeddings, bias, targets, options)


def decides_for_triton(impl: Implementation, hidden: Tensor, item_embeddings: Tensor) -> bool:
    """Return whether the Triton kernels compute exact cross-entropy; see ``takes_triton``."""
    n_items, d = item_embeddings.shape
    faster = (
        compute_dtype(hidden, item_embeddings) != torch.float32
        or d <= LARGEST_FLOAT32
        or n_items > MOST_ITEMS
    )
    return takes_triton(impl, hidden, item_embeddings, deterministic=True, faster=faster)


def check_numbers(
    label_smoothing: float, z_loss: float, logit_scale: float, skip_mass: float
) -> None:
    """Raise a ``ValueError`` unless the options are in their ranges; see ``cut_cross_entropy``."""
    for name, share in (("label_smoothing", label_smoothing), ("skip_mass", skip_mass)):
        if not 0 <= share < 1:
            raise ValueError(f"{name} must be at least 0 and under 1, got {share}")
    if not 0 <= z_loss < math.inf:
        raise ValueError(f"z_loss must be at least 0 and finite, got {z_loss}")
    if not 0 < logit_scale < math.inf:
        raise ValueError(f"logit_scale must be positive and finite, got {logit_scale}")


def check_per_item(name: str, values: Tensor, item_embeddings: Tensor) -> None:
    """Raise a ``ValueError`` unless ``values`` hold one number for each row, on its device."""
    if values.shape != item_embeddings.shape[:1]:
        raise ValueError(f"expected {name} of ({len(item_embeddings)},), got {tuple(values.shape)}")
    if values.device != item_embeddings.device:
        raise ValueError(
            f"expected {name} on {item_embeddings.device} like item_embeddings, got {values.device}"
        )


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The loss and its gradients at once, a few tokens at a time, in PyTorch."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        item_embeddings: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        options: tuple[float, float, float],
    ) -> Tensor:
        smoothing, z_loss, scale = options
        n_tokens, n_items = len(hidden), len(item_embeddings)
        dtype = compute_dtype(hidden, item_embeddings)
        wide = torch.promote_types(dtype, torch.float32)
        # Logits of half precision would be rounded: only the factors are, as in the kernels.
        x, w = hidden.to(dtype).to(wide), item_embeddings.to(dtype).to(wide)
        total = hidden.new_zeros((), dtype=wide)
        needed = any(ctx.needs_input_grad)
        grad_hidden = torch.empty_like(hidden, dtype=wide) if needed else None
        grad_table = torch.zeros_like(item_embeddings, dtype=wide) if needed else None
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=wide)
        for chunk in chunks(n_tokens, n_items, hidden.device):
            logits = matmul(x[chunk], w.T).mul_(scale)
            if bias is not None:
                logits += bias
            log_sum = logits.logsumexp(1)
            of_target = logits.gather(1, targets[chunk, None])[:, 0]
            of_all = logits.mean(1) if smoothing else of_target
            losses = log_sum - (1 - smoothing) * of_target - smoothing * of_all
            total += (losses + z_loss * log_sum.square()).sum()
            if grad_hidden is None or grad_table is None:
                continue
            by_logit = logits.sub_(log_sum[:, None]).exp_()
            by_logit.mul_((1 + 2 * z_loss * log_sum)[:, None]).sub_(smoothing / n_items)
            misses = by_logit.new_full((len(by_logit), 1), smoothing - 1)
            by_logit.scatter_add_(1, targets[chunk, None], misses)
            if grad_bias is not None:
                grad_bias += by_logit.sum(0)
            by_product = by_logit.mul_(scale)
            grad_hidden[chunk] = matmul(by_product, w)
            grad_table += matmul(by_product.T, x[chunk])
        ctx.save_for_backward(grad_hidden, grad_table, grad_bias)
        ctx.dtypes = (hidden.dtype, item_embeddings.dtype, bias is not None and bias.dtype)
        ctx.n_tokens = n_tokens
        return total / n_tokens

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        factor = grad / ctx.n_tokens
        gradients = (
            None if values is None else (values * factor).to(dtype)
            for values, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*gradients, None, None)


class _TwoPasses(torch.autograd.Function):
    """The loss and the hidden states' gradient in one pass, the table's in another, in Triton."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        item_embeddings: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        options: tuple[float, float, float, bool, float],
    ) -> Tensor:
        from sce_pipeline.losses.kernels import cce as kernels

        dtype = compute_dtype(hidden, item_embeddings)
        x, w = hidden.to(dtype).contiguous(), item_embeddings.to(dtype).contiguous()
        targets = targets.contiguous()
        terms = _terms(x, w, bias, *options)
        losses, sums = kernels.hidden_pass(x, w, targets, terms, grad=ctx.needs_input_grad[0])
        numbers = terms.scale, terms.smoothing, terms.z_loss, terms.skip_mass
        ctx.save_for_backward(x, w, targets, *sums, *terms[len(numbers) :])
        ctx.numbers = numbers
        ctx.dtypes = hidden.dtype, item_embeddings.dtype
        return losses.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from sce_pipeline.losses.kernels import cce as kernels

        x, w, targets, *saved = ctx.saved_tensors
        sums = kernels.Sums(*saved[: len(kernels.Sums._fields)])
        terms = kernels.Terms(*ctx.numbers, *saved[len(sums) :])
        of_hidden, of_table = ctx.dtypes
        grad_hidden = None
        if sums.grad is not None:
            grad_hidden = scaled(sums.grad, grad / len(x), of_hidden)
        if not any(ctx.needs_input_grad[1:3]):
            return grad_hidden, None, None, None, None
        with_bias = ctx.needs_input_grad[2]
        tokens = kernels.tokens_by_block(x, w, targets)
        grad_table = torch.empty_like(w, dtype=of_table)
        grad_bias = kernels.table_pass(
            x, w, targets, tokens, terms, sums, grad, grad_table, grad_bias=with_bias
        )
        return grad_hidden, grad_table, grad_bias, None, None


def _terms(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    label_smoothing: float,
    z_loss: float,
    logit_scale: float,
    normalized: bool,
    skip_mass: float,
) -> Terms:
    from sce_pipeline.losses.kernels import cce as kernels

    token_scale = item_scale = mean_item = sum_token = None
    if normalized:
        token_scale, item_scale = (
            kernels.row_norms(rows).clamp_(min=SMALLEST_NORM).reciprocal_() for rows in (x, w)
        )
    if label_smoothing:
        mean_item = _weighted_sum(w, item_scale) / len(w)
        sum_token = _weighted_sum(x, token_scale)
    return kernels.Terms(
        scale=logit_scale,
        smoothing=label_smoothing,
        z_loss=z_loss,
        skip_mass=skip_mass,
        bias=bias,
        token_scale=token_scale,
        item_scale=item_scale,
        mean_item=mean_item,
        sum_token=sum_token,
    )


def _weighted_sum(rows: Tensor, weights: Tensor | None) -> Tensor:
    """Return the sum of ``rows`` [n, d], each times its weight [n], float32 [d]."""
    if weights is None:
        return rows.sum(0, dtype=torch.float32)
    n, d = rows.shape
    parts = [matmul(weights[chunk], rows[chunk].float()) for chunk in chunks(n, d, rows.device)]
    return torch.stack(parts).sum(0)
