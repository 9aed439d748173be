"""CE⁻: cross-entropy over the target and sampled negatives."""

from __future__ import annotations

from functools import partial

from sce_pipeline.losses.grouped import grouped_cross_entropy
from sce_pipeline.losses.implementation import Implementation
from sce_pipeline.losses.negatives import Exclude, Shared
from sce_pipeline.losses.per_token import per_token_cross_entropy
from sce_pipeline.losses.sampled import Means, SampledLoss


class CEMinus(SampledLoss):
    """CE⁻: ``logsumexp(target and negatives' logits) - target logit``.

    With ``log_correction`` the negatives' logits grow by log(candidates / valid negatives). Let Z
    be the sum of exp(logit) over the N candidates of a token. The V valid negatives are, given V,
    independent and uniform over the candidates, so each exp(logit) has the mean Z / N, and their
    sum, multiplied by N / V, the mean Z: the sum inside the logarithm is then an unbiased estimate
    of that over the target and all candidates. V may be random, where collisions are rejected; only
    a token left with V = 0 estimates Z by 0.

    Args:
        n_negatives: Negatives of each token.
        shared: Who shares a draw of negatives; see ``SampledLoss``.
        exclude: What is no negative; see ``SampledLoss``.
        log_correction: Whether negatives stand for all candidates, or only for themselves.
        impl: Which implementation computes; see ``SampledLoss``.
    """

    def __init__(
        self,
        *,
        n_negatives: int,
        shared: Shared,
        exclude: Exclude,
        log_correction: bool,
        impl: Implementation = "auto",
    ) -> None:
        super().__init__(n_negatives=n_negatives, shared=shared, exclude=exclude, impl=impl)
        self.log_correction = log_correction

    def _means(self, n_items: int, *, triton: bool) -> Means:
        return Means(
            partial(per_token_cross_entropy, log_correction=self.log_correction, triton=triton),
            partial(grouped_cross_entropy, triton=triton),
        )
