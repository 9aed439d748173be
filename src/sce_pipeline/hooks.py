"""Kedro hooks: what every node costs, and the report that a run ends with."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

from kedro.framework.hooks import hook_impl
from kedro.pipeline.node import Node
from rich import get_console

logger = logging.getLogger(__name__)


def _cuda() -> Any:
    """Return ``torch.cuda`` once a GPU is in use; importing torch here would cost seconds."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


class NodeCostHooks:
    """Log how long each node took and, on a GPU, the most memory its tensors took at once."""

    def __init__(self) -> None:
        self._started: dict[str, float] = {}

    @hook_impl
    def before_node_run(self, node: Node) -> None:
        """Start the clock and forget earlier peaks of memory."""
        if cuda := _cuda():
            cuda.reset_peak_memory_stats()
        self._started[node.name] = time.perf_counter()

    @hook_impl
    def after_node_run(self, node: Node) -> None:
        """Say what the node took."""
        seconds = time.perf_counter() - self._started.pop(node.name)
        if cuda := _cuda():
            peak = cuda.max_memory_allocated() / 2**20
            logger.info("%s took %.1f s and %.0f MB of GPU memory", node.name, seconds, peak)
        else:
            logger.info("%s took %.1f s", node.name, seconds)


class ReportHooks:
    """Print the run's report when everything is done, where nothing scrolls it away."""

    def __init__(self) -> None:
        self._report: str | None = None

    @hook_impl
    def after_node_run(self, outputs: dict[str, Any]) -> None:
        """Keep the report."""
        self._report = outputs.get("run_report", self._report)

    @hook_impl
    def after_pipeline_run(self) -> None:
        """Print it, as text that means nothing but itself."""
        if self._report is not None:
            get_console().print(self._report, markup=False, highlight=False, soft_wrap=True)
