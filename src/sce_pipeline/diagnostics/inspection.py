"""All that is looked at in a loss, for one draw."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sce_pipeline.diagnostics.candidates import find_candidates
from sce_pipeline.diagnostics.coverage import Coverage, measure_coverage
from sce_pipeline.diagnostics.gradients import GradientComparison, compare_gradients
from sce_pipeline.losses import Histories, Loss


class Inspection(NamedTuple):
    """What one draw of a loss keeps of the exact cross-entropy.

    Attributes:
        coverage: What lies on the items that it compares.
        gradients: Its gradients, of the same draw, beside the exact ones.
    """

    coverage: Coverage
    gradients: GradientComparison


def inspect_loss(
    loss: Loss,
    hidden: Tensor,
    item_embeddings: Tensor,
    targets: Tensor,
    sequence: Tensor,
    histories: Histories | None,
    *,
    seed: int,
) -> Inspection:
    """Look into the draw that ``loss`` makes after ``seed``.

    PyTorch's random generators are left as they were. The other arguments are those of
    ``Loss.forward``, and so are the errors.
    """

    def mean_loss(hidden: Tensor, item_embeddings: Tensor) -> Tensor:
        torch.manual_seed(seed)
        return loss(hidden, item_embeddings, targets, sequence, histories)

    with torch.random.fork_rng():
        gradients = compare_gradients(mean_loss, hidden, item_embeddings, targets)
        torch.manual_seed(seed)
        candidates = find_candidates(loss, hidden, item_embeddings, targets, sequence, histories)
    return Inspection(measure_coverage(hidden, item_embeddings, targets, candidates), gradients)
