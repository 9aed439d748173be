"""What a loss that compares targets with some of the items keeps of the exact cross-entropy.

For notebooks and experiments; no pipeline needs it. Sizes are those of a batch, and everything is
computed in PyTorch for a few tokens at a time. Hidden states and table in float64 give an oracle.
"""

from __future__ import annotations

from sce_pipeline.diagnostics.candidates import Candidates, find_candidates, shuffle_items
from sce_pipeline.diagnostics.coverage import Coverage, measure_coverage, pooled_cross_entropy
from sce_pipeline.diagnostics.gradients import Agreement, GradientComparison, compare_gradients
from sce_pipeline.diagnostics.inspection import Inspection, inspect_loss

__all__ = [
    "Agreement",
    "Candidates",
    "Coverage",
    "GradientComparison",
    "Inspection",
    "compare_gradients",
    "find_candidates",
    "inspect_loss",
    "measure_coverage",
    "pooled_cross_entropy",
    "shuffle_items",
]
