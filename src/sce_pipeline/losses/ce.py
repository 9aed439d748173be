"""Cross-entropy over the whole catalogue."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from sce_pipeline.losses.base import Histories, Loss, at_least_float32


class CE(Loss):
    """CE: ``logsumexp(all logits) - target logit``, from the whole matrix [tokens, n_items]."""

    def _mean_loss(
        self,
        hidden: Tensor,
        item_embeddings: Tensor,
        targets: Tensor,
        sequence: Tensor,
        histories: Histories,
    ) -> Tensor:
        return functional.cross_entropy(at_least_float32(hidden @ item_embeddings.T), targets)
