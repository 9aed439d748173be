"""Tables about a run, as text for a terminal and a file."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.table import Table

WIDTH = 80
"""Columns of text in a report: as many as the narrowest common terminal has."""


def render(*parts: RenderableType) -> str:
    """Lay parts out one below the other, as plain text."""
    console = Console(file=io.StringIO(), width=WIDTH, color_system=None, markup=False)
    for part in parts:
        console.print(part)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines())


def tabulate_metrics(
    metrics: Mapping[str, Mapping[str, Any]], names: Mapping[str, str], cutoffs: Sequence[int]
) -> Table:
    """Set the metrics of several rankings side by side: a block for each metric, k across.

    Args:
        metrics: Measured rankings by their name.
        names: Titles of the metrics by the prefix of their keys.
        cutoffs: The k.
    """
    table = Table(box=SIMPLE_HEAD)
    table.add_column("metric")
    table.add_column("ranking")
    for k in cutoffs:
        table.add_column(f"@{k}", justify="right")
    for prefix, title in names.items():
        for place, (ranking, measured) in enumerate(metrics.items()):
            values = [f"{measured[f'{prefix}@{k}']['value']:.4f}" for k in cutoffs]
            last = place == len(metrics) - 1
            table.add_row("" if place else title, ranking, *values, end_section=last)
    return table


def describe_interval(ranking: str, estimate: Mapping[str, float], confidence: float) -> str:
    """Write an estimate with its interval out in a sentence."""
    return (
        f"NDCG@10 of {ranking}: {estimate['value']:.4f} "
        f"({confidence:.0%} interval {estimate['low']:.4f} to {estimate['high']:.4f})"
    )


def tabulate_examples(examples: Sequence[Mapping[str, Any]]) -> Table:
    """Set what some users had, were recommended and took next side by side."""
    table = Table(box=SIMPLE_HEAD, show_lines=True)
    for title in ("user", "had last", "recommended", "took next (rank)"):
        table.add_column(title)
    for example in examples:
        table.add_row(*(str(example[key]) for key in ("user", "had_last", "recommended", "took")))
    return table
