"""A suggestion as text, for a terminal and a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from sce_pipeline.pipelines.reporting.tables import render

COLUMNS = {
    "peak": "peak",
    "parameters": "weights",
    "gradients": "grads",
    "optimiser": "Adam",
    "activations": "activations",
    "loss": "loss",
    "other": "other",
}
"""Titles of what the memory of a step is for."""


def write_suggestion(suggestion: Mapping[str, Any]) -> str:
    """Lay out what each loss costs, and what is suggested and why."""
    advice = suggestion["recommendation"]
    lines = [f"Suggestion: {advice['loss'] or 'none'}. {_sentence(advice['reason'])}"]
    if advice["command"] is not None:
        lines.append(f"With what else this run was given: {advice['command']}")
    return render(
        f"{suggestion['dataset']} on {suggestion['device']}: {suggestion['n_items']:,} items, "
        f"{_describe_batch(suggestion['batch'])}, {suggestion['free_mb']:,.0f} MB free",
        "Measured on one device, in some steps of the first epoch; memory in MB",
        _tabulate(suggestion["losses"]),
        *lines,
    )


def _tabulate(losses: list[dict[str, Any]]) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False)
    table.add_column("loss", no_wrap=True)
    for title in ("s an epoch", *COLUMNS.values()):
        table.add_column(title, justify="right")
    for loss in losses:
        if not loss["fits"]:
            table.add_row(loss["loss"], "does not fit")
            continue
        sizes = [f"{loss['allocated_mb'][part]:,.1f}" for part in COLUMNS]
        table.add_row(loss["loss"], _seconds(loss["epoch_seconds"]), *sizes)
    return table


def _describe_batch(batch: Mapping[str, Any]) -> str:
    size = f"{batch['batch_size']:,} sequences a step"
    if batch["batch_tokens"] is not None:
        size = f"{batch['batch_tokens']:,} tokens a step"
    parts = batch["accumulation_steps"]
    return size if parts == 1 else f"{size} in {parts} parts"


def _seconds(value: float) -> str:
    return f"{value:,.1f}" if value >= 10 else f"{value:.3g}"  # noqa: PLR2004


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
