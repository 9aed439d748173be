"""Tables over all runs: the leaderboard, its mean over seeds, and pairs that differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import polars as pl

from sce_pipeline.evaluation.significance import compare_ndcg, holm
from sce_pipeline.parameters import (
    ComparisonParameters,
    DataProcessingParameters,
    EvaluationParameters,
    TrainingParameters,
)
from sce_pipeline.pipelines.comparison.runs import CUTOFF, MONITOR, Run, Runs
from sce_pipeline.provenance import ITEM_STAMP, flatten

METRICS = tuple(f"{metric}@{CUTOFF}" for metric in ("ndcg", "hr", "coverage", "surprisal"))
COSTS = ("training_seconds", "seconds_per_epoch", "memory_mb")

INCIDENTAL = {"seed", "checkpoint_steps"}
"""Training parameters that say nothing of what is trained."""

LEADERBOARD = {
    "version": pl.String,
    "model": pl.String,
    "loss": pl.String,
    "seed": pl.Int64,
    "changes": pl.String,
    "users": pl.Int64,
    "items": pl.Int64,
    **{
        f"{metric}{end}": pl.Float64
        for metric in METRICS
        for end in ("", "_low", "_high")
        if end == "" or not metric.startswith("coverage")  # which is no mean over users
    },
    "best_epoch": pl.Int64,
    "epochs": pl.Int64,
    "training_seconds": pl.Float64,
    "seconds_per_epoch": pl.Float64,
    "memory_mb": pl.Int64,
    "device": pl.String,
}
"""Columns of the leaderboard."""

SIGNIFICANCE = {
    "first": pl.String,
    "second": pl.String,
    "users": pl.Int64,
    "first_ndcg@10": pl.Float64,
    "second_ndcg@10": pl.Float64,
    "difference": pl.Float64,
    "low": pl.Float64,
    "high": pl.Float64,
    "p_value": pl.Float64,
    "p_holm": pl.Float64,
}
"""Columns of the table of pairs."""


def tabulate_runs(
    runs: Runs,
    training: TrainingParameters,
    data_processing: DataProcessingParameters,
    loss_presets: Mapping[str, Any],
    model_presets: Mapping[str, Any],
) -> pl.DataFrame:
    """Tell all complete runs and baselines in a row each, those with the best NDCG@10 first.

    Returns:
        The columns of ``LEADERBOARD``. ``changes`` are the parameters that differ from the presets
        of the run's loss and model and from what is now in force for the data set, and the
        fingerprint of the items where they are others than those of now. A baseline has neither
        loss nor costs.
    """
    in_force = {
        ITEM_STAMP: runs.origin[ITEM_STAMP],
        "data_processing": data_processing.model_dump(mode="json"),
        **training.model_dump(mode="json", exclude={"loss", "model"}),
    }
    rows = []
    for run in runs.complete:
        presets = {
            "loss": loss_presets.get(run.loss or "", {}),
            "model": model_presets.get(run.model, {}),
        }
        rows.append(_row(run, {**in_force, **presets}))
    return pl.DataFrame(rows, schema=LEADERBOARD).sort(MONITOR, descending=True)


def tabulate_seeds(leaderboard: pl.DataFrame) -> pl.DataFrame:
    """Take runs together that differ in their seeds alone: n, mean and standard deviation.

    A seed that was run again counts once, with its latest version, as it is the same draw. The
    deviation is that of a sample, and null for a single seed.
    """
    same = ["model", "loss", "changes", "users", "items"]
    values = [*METRICS, *COSTS]
    return (
        leaderboard.filter(pl.col("loss").is_not_null())
        .sort("version")
        .unique([*same, "seed"], keep="last", maintain_order=True)
        .group_by(same, maintain_order=True)
        .agg(
            pl.col("seed").len().alias("n"),
            pl.col("seed").sort().cast(pl.String).str.join(", ").alias("seeds"),
            *(
                statistic.alias(f"{value}_{name}")
                for value in values
                for name, statistic in (
                    ("mean", pl.col(value).mean()),
                    ("deviation", pl.col(value).std()),
                )
            ),
        )
        .sort(f"{MONITOR}_mean", descending=True)
    )


def tabulate_pairs(
    pairs: Sequence[tuple[Run, Run]],
    comparison: ComparisonParameters,
    evaluation: EvaluationParameters,
) -> pl.DataFrame:
    """Compare the NDCG@10 of pairs of runs over their users; p values also as Holm corrects them.

    Raises:
        ValueError: The runs of a pair are of other users, targets or catalogues.
    """
    rows = []
    for first, second in pairs:
        difference = compare_ndcg(
            first.load_rankings(),
            second.load_rankings(),
            (first.name, second.name),
            CUTOFF,
            evaluation.n_bootstrap,
            evaluation.confidence,
            comparison.n_permutations,
            evaluation.seed,
        )
        rows.append(
            {
                "first": first.name,
                "second": second.name,
                "users": difference.n_users,
                "first_ndcg@10": difference.first,
                "second_ndcg@10": difference.second,
                "difference": difference.value,
                **{key: asdict(difference)[key] for key in ("low", "high", "p_value")},
            }
        )
    for row, corrected in zip(rows, holm([row["p_value"] for row in rows]), strict=True):
        row["p_holm"] = corrected
    return pl.DataFrame(rows, schema=SIGNIFICANCE)


def _row(run: Run, usual: Mapping[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(LEADERBOARD)
    parameters = run.history["parameters"]
    row |= {
        "version": run.version,
        "model": run.model,
        "loss": run.loss,
        "users": run.metrics["n_users"],
        "items": run.metrics["n_items"],
    }
    made = run.origin
    if run.loss is not None:
        made |= parameters
        row |= {"seed": parameters["seed"], **_costs(run.history)}
    elif run.model in parameters:
        made |= parameters[run.model]
    row["changes"] = describe_changes(made, usual)
    for metric in METRICS:
        if metric in run.metrics:
            estimate = run.metrics[metric]
            row[metric] = estimate["value"]
            row |= {f"{metric}_{end}": estimate[end] for end in ("low", "high") if end in estimate}
    return row


def _costs(history: Mapping[str, Any]) -> dict[str, Any]:
    epochs = history["epochs"]
    seconds = sum(epoch["training_seconds"] for epoch in epochs)
    return {
        "best_epoch": history["best_epoch"],
        "epochs": len(epochs),
        "training_seconds": seconds,
        "seconds_per_epoch": seconds / len(epochs),
        "memory_mb": max(epoch["memory_mb"] for epoch in epochs),
        "device": history["device"],
    }


def describe_changes(made: Mapping[str, Any], usual: Mapping[str, Any]) -> str | None:
    """Write out which values differ from the usual ones; None where none does."""
    known = dict(flatten(usual))
    changes = (
        f"{name}={value}"
        for name, value in flatten(made)
        if name not in INCIDENTAL and (name not in known or value != known[name])
    )
    return ", ".join(changes) or None
