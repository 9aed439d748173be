"""BCE and gBCE: binary cross-entropy over the target and sampled negatives."""

from __future__ import annotations

from functools import partial

from sce_pipeline.losses.grouped import grouped_binary_cross_entropy
from sce_pipeline.losses.implementation import Implementation
from sce_pipeline.losses.negatives import Exclude, Shared
from sce_pipeline.losses.per_token import per_token_binary_cross_entropy
from sce_pipeline.losses.sampled import Means, SampledLoss


class BCE(SampledLoss):
    """BCE: the mean binary cross-entropy of a target and its negatives.

    The mean is over ``1 + n_negatives`` terms, of which a rejected negative gives 0.
    """

    def beta(self, n_items: int) -> float:
        """Return the exponent of the target's σ(x) for a catalogue of ``n_items``."""
        return 1.0

    def _means(self, n_items: int, *, triton: bool) -> Means:
        beta = self.beta(n_items)
        return Means(
            partial(per_token_binary_cross_entropy, beta=beta, triton=triton),
            partial(grouped_binary_cross_entropy, beta=beta, triton=triton),
        )


class GBCE(BCE):
    """gBCE (Petrov & Macdonald, 2023, arXiv 2308.07192): BCE with the target's σ(x) to the power β.

    β = α·(t·(1 - 1/α) + 1/α) with the sampling rate α = n_negatives / (n_items - 1): BCE at t = 0,
    and at t = 1 calibrated to the share of negatives that is drawn. With more negatives than items
    to draw them from, α is taken as 1, where gBCE is BCE, and a warning is logged once.

    Args:
        n_negatives: Negatives of each token.
        shared: Who shares a draw of negatives; see ``SampledLoss``.
        exclude: What is no negative; see ``SampledLoss``.
        t: Calibration, between 0 and 1.
        impl: Which implementation computes; see ``SampledLoss``.
    """

    def __init__(
        self,
        *,
        n_negatives: int,
        shared: Shared,
        exclude: Exclude,
        t: float,
        impl: Implementation = "auto",
    ) -> None:
        super().__init__(n_negatives=n_negatives, shared=shared, exclude=exclude, impl=impl)
        self.t = t

    def beta(self, n_items: int) -> float:
        """Return the exponent β for a catalogue of ``n_items``."""
        if self.n_negatives > n_items - 1:
            self._warn_once(
                "gBCE has n_negatives = %d, more than the %d items beside a target: "
                "its sampling rate is taken as 1, which makes it BCE",
                self.n_negatives,
                n_items - 1,
            )
            return 1.0
        alpha = self.n_negatives / (n_items - 1)
        return alpha * (self.t * (1 - 1 / alpha) + 1 / alpha)
