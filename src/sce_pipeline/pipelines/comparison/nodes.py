"""Nodes of the comparison."""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
import polars as pl
from plotly import graph_objects as go

from sce_pipeline.parameters import (
    ComparisonParameters,
    DataProcessingParameters,
    EvaluationParameters,
    TrainingParameters,
)
from sce_pipeline.pipelines.comparison.figures import plot_validation_curves
from sce_pipeline.pipelines.comparison.report import (
    render_figure,
    render_page,
    render_paragraph,
    render_table,
)
from sce_pipeline.pipelines.comparison.runs import CUTOFF, Run, Runs, join_parts
from sce_pipeline.pipelines.comparison.tables import tabulate_pairs, tabulate_runs, tabulate_seeds
from sce_pipeline.provenance import differences, read_origin

logger = logging.getLogger(__name__)

Partitions = dict[str, Callable[[], Any]]


def collect_runs(
    run_histories: Partitions,
    run_metrics: Partitions,
    run_rankings: Partitions,
    test_sequences: dict[str, np.ndarray],
    dataset: str,
) -> Runs:
    """Join what the runs on the data set left, and say which are incomplete or on other data.

    Raises:
        ValueError: No run of a model is complete, or the test sequences have no stamp of items.
    """
    origin = read_origin(test_sequences)
    runs = join_parts(dataset, origin, run_histories, run_metrics, run_rankings)
    if not runs.models:
        lacks = "".join(f"; {name} lacks {parts}" for name, parts in runs.incomplete.items())
        raise ValueError(f"there is no complete run of a model on {dataset} to compare{lacks}")
    logger.info("%d runs of models are complete", len(runs.models))
    for name, lacks in runs.incomplete.items():
        logger.warning("%s is left out, as it lacks: %s", name, lacks)
    for run in runs.on_other_data:
        logger.warning(
            "%s is on data that was made otherwise and stands in tables alone: %s",
            run.name,
            ", ".join(differences(run.origin, origin)),
        )
    return runs


def select_best(compared_runs: Runs) -> list[Run]:
    """Choose the best run of each loss, and the latest of each baseline, on the data of now."""
    return compared_runs.best_per_loss()


def rank_runs(
    compared_runs: Runs,
    training: TrainingParameters,
    data_processing: DataProcessingParameters,
    loss_presets: dict[str, Any],
    model_presets: dict[str, Any],
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Tell all runs in a row each; the frame is saved in two formats."""
    leaderboard = tabulate_runs(
        compared_runs, training, data_processing, loss_presets, model_presets
    )
    return leaderboard, leaderboard


def average_seeds(leaderboard: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Take runs together that differ in their seeds alone; the frame is saved in two formats."""
    seeds = tabulate_seeds(leaderboard)
    return seeds, seeds


def compare_pairs(
    compared_runs: Runs,
    best_runs: list[Run],
    comparison: ComparisonParameters,
    evaluation: EvaluationParameters,
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Test whether pairs of runs differ over the users; the frame is saved in two formats."""
    if comparison.pairs == "best_per_loss":
        pairs = list(combinations(best_runs, 2))
    else:
        pairs = [
            (compared_runs.find(first), compared_runs.find(second))
            for first, second in comparison.pairs
        ]
    significance = tabulate_pairs(pairs, comparison, evaluation)
    return significance, significance


def plot_all_validation_curves(compared_runs: Runs) -> go.Figure:
    """Draw the validation of every run."""
    return plot_validation_curves(compared_runs.models)


def collect_figures(
    quality_against_cost: go.Figure,
    validation_curves: go.Figure,
    quality_by_popularity: go.Figure,
    quality_by_history_length: go.Figure,
) -> dict[str, go.Figure]:
    """Put the figures under the headings that they have in the report."""
    return {
        "Quality and cost": quality_against_cost,
        "Validation": validation_curves,
        "Popularity of the target": quality_by_popularity,
        "Length of the history": quality_by_history_length,
    }


def write_report(
    compared_runs: Runs,
    leaderboard: pl.DataFrame,
    seed_averages: pl.DataFrame,
    significance: pl.DataFrame,
    figures: dict[str, go.Figure],
) -> str:
    """Lay tables and figures out as one page of HTML."""
    lacking = pl.DataFrame(
        list(compared_runs.incomplete.items()), schema=["run", "lacks"], orient="row"
    )
    sections = {
        "Runs": render_paragraph(
            f"{len(compared_runs.models):,} runs of models, "
            f"{len(compared_runs.complete) - len(compared_runs.models):,} of baselines, "
            f"and {len(lacking):,} that are incomplete. Changes are against the presets of loss "
            "and model and against what is in force for the data set."
        )
        + render_paragraph(_describe_other_data(compared_runs))
        + render_table(leaderboard),
        "Means over seeds": render_table(seed_averages),
        "Pairs": render_paragraph(
            f"Differences of NDCG@{CUTOFF}, first − second, over the users of both: bootstrap "
            "intervals, and p values of random signs, as they are and corrected for the number "
            "of pairs (Holm)."
        )
        + render_table(significance),
        **{heading: render_figure(figure) for heading, figure in figures.items()},
    }
    if len(lacking):
        sections["Incomplete runs"] = render_table(lacking)
    return render_page(f"Runs on {compared_runs.dataset}", sections)


def _describe_other_data(runs: Runs) -> str:
    if not runs.on_other_data:
        return "All are on the data of now."
    names = "; ".join(run.name for run in runs.on_other_data)
    return (
        f"Of these, {len(runs.on_other_data):,} are on data that was made otherwise than that of "
        f"now and are not among the best runs that are held against each other below: {names}."
    )
