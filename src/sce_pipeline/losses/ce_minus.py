"""CE⁻: cross-entropy over the target and sampled negatives."""

from __future__ import annotations

from torch import Tensor

from sce_pipeline.losses.grouped import Groups, grouped_cross_entropy
from sce_pipeline.losses.implementation import Implementation
from sce_pipeline.losses.negatives import Exclude, Shared
from sce_pipeline.losses.per_token import per_token_cross_entropy
from sce_pipeline.losses.sampled import SampledLoss
from sce_pipeline.losses.sampling import Draw


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

    def _mean_of_draw(
        self, hidden: Tensor, item_embeddings: Tensor, targets: Tensor, drawn: Draw, *, triton: bool
    ) -> Tensor:
        return per_token_cross_entropy(
            hidden,
            item_embeddings,
            targets,
            drawn,
            log_correction=self.log_correction,
            triton=triton,
        )

    def _mean_of_groups(
        self,
        hidden: Tensor,
        item_embeddings: Tensor,
        targets: Tensor,
        groups: Groups,
        *,
        triton: bool,
    ) -> Tensor:
        if not self.log_correction:
            groups = groups._replace(log_masses=None)
        return grouped_cross_entropy(hidden, item_embeddings, targets, groups, triton=triton)
