"""The record of all epochs, and what follows from it."""

from __future__ import annotations

from typing import Any

from sce_pipeline.training.validation import MONITOR


class History:
    """The epochs of a run, each with its loss, validation metrics and costs.

    Args:
        epochs: Those there are already.
    """

    def __init__(self, epochs: list[dict[str, Any]] | None = None) -> None:
        self.epochs = list(epochs or [])

    @property
    def best(self) -> dict[str, Any]:
        """The epoch with the highest validation metric, the earliest of equals."""
        return max(self.epochs, key=lambda epoch: epoch[MONITOR])

    @property
    def improved(self) -> bool:
        """Whether the last epoch is the best."""
        return self.best is self.epochs[-1]

    def is_over(self, max_epochs: int, patience: int) -> bool:
        """Return whether there were ``max_epochs``, or ``patience`` since the best."""
        n = len(self.epochs)
        return n >= max_epochs or (n > 0 and n - self.best["epoch"] >= patience)
