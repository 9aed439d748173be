"""Figures over all runs, as interactive Plotly charts: one colour for each loss.

Where runs are of several models, each has a symbol and a dash of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle

import numpy as np
import polars as pl
import torch
from plotly import graph_objects as go
from plotly.colors import qualitative
from plotly.subplots import make_subplots

from sce_pipeline.evaluation.metrics import ndcg
from sce_pipeline.losses import LOSSES
from sce_pipeline.models import MODELS
from sce_pipeline.pipelines.comparison.runs import CUTOFF, MONITOR, Run
from sce_pipeline.pipelines.reporting.figures import finish

N_DECILES = 10
"""Groups of items with as many training interactions each."""

N_LENGTHS = 8
"""Most groups of users by the length of their history, of about as many users each."""

COSTS = {"memory_mb": "Peak memory, MB", "training_seconds": "Training time, seconds"}
"""What quality is held against, with the titles of the axes."""

BASELINE_DASHES = {"popularity": "dot", "item_knn": "dash", "pure_svd": "dashdot"}
BASELINE_COLOUR = "#8c8c8c"

MODEL_SYMBOLS = dict(zip(MODELS, cycle(("circle", "diamond", "square")), strict=False))
MODEL_DASHES = dict(zip(MODELS, cycle(("solid", "dash", "dot")), strict=False))

_LOSS_COLOURS = dict(zip(LOSSES, cycle(qualitative.Dark24), strict=False))


def colour_of(loss: str | None) -> str:
    """Return the colour of a loss, the same in all figures; of one that is no more, black."""
    return _LOSS_COLOURS.get(loss or "", "black")


def plot_quality_against_cost(leaderboard: pl.DataFrame) -> go.Figure:
    """Draw the NDCG@10 of every run, with its interval, against peak memory and training time.

    Baselines, which have no such costs, are lines across.
    """
    models = leaderboard.filter(pl.col("loss").is_not_null())
    figure = make_subplots(cols=len(COSTS), shared_yaxes=True, horizontal_spacing=0.04)
    several = models["model"].n_unique() > 1
    for loss, model in sorted(set(models.select("loss", "model").iter_rows())):
        rows = models.filter(pl.col("loss") == loss, pl.col("model") == model)
        name, values = _name(loss, model, several), rows[MONITOR].to_numpy()
        texts = [
            f"{model} + {loss}, {row['version']}<br>seed {row['seed']}, {row['device']}"
            f"<br>{row['changes'] or 'presets'}"
            for row in rows.iter_rows(named=True)
        ]
        for column, cost in enumerate(COSTS, start=1):
            points = go.Scatter(
                x=rows[cost].to_list(),
                y=values,
                error_y={
                    "array": rows[f"{MONITOR}_high"].to_numpy() - values,
                    "arrayminus": values - rows[f"{MONITOR}_low"].to_numpy(),
                    "symmetric": False,
                    "thickness": 1,
                },
                text=texts,
                hovertemplate="%{text}<br>NDCG@10 %{y:.4f} at %{x:,.4g}<extra></extra>",
                mode="markers",
                marker={"color": colour_of(loss), "size": 9, "symbol": MODEL_SYMBOLS.get(model)},
                name=name,
                legendgroup=name,
                showlegend=column == 1,
            )
            figure.add_trace(points, row=1, col=column)
    baselines = leaderboard.filter(pl.col("loss").is_null()).sort("version")
    for row in baselines.unique("model", keep="last", maintain_order=True).iter_rows(named=True):
        for column in range(1, len(COSTS) + 1):
            figure.add_hline(
                row[MONITOR],
                line={"color": BASELINE_COLOUR, "dash": BASELINE_DASHES[row["model"]], "width": 1},
                annotation_text=row["model"],
                annotation_font_color=BASELINE_COLOUR,
                row=1,
                col=column,
            )
    for column, title in enumerate(COSTS.values(), start=1):
        figure.update_xaxes(title_text=title, type="log", row=1, col=column)
    figure.update_yaxes(title_text="Test NDCG@10", row=1, col=1)
    return finish(figure, f"Quality and cost of {models.height:,} runs")


def plot_validation_curves(runs: Sequence[Run]) -> go.Figure:
    """Draw the validation NDCG@10 of every epoch of every run of a model, the best one marked."""
    models = [run for run in runs if run.loss is not None]
    figure = go.Figure()
    several = _are_several(models)
    shown: set[str] = set()
    for run in sorted(models, key=lambda run: (run.loss or "", run.model, run.version)):
        name = _name(run.loss, run.model, several)
        epochs = run.history["epochs"]
        best = run.history["best_epoch"]
        line = go.Scatter(
            x=[epoch["epoch"] for epoch in epochs],
            y=[epoch[MONITOR] for epoch in epochs],
            mode="lines+markers",
            line={
                "color": colour_of(run.loss),
                "width": 1.5,
                "dash": MODEL_DASHES.get(run.model),
            },
            marker={"size": [9 if epoch["epoch"] == best else 3 for epoch in epochs], "opacity": 1},
            name=name,
            legendgroup=name,
            showlegend=name not in shown,
            hovertemplate=f"{run.name}<br>epoch %{{x}}: %{{y:.4f}}<extra></extra>",
        )
        shown.add(name)
        figure.add_trace(line)
    figure.update_xaxes(title_text="Epoch")
    figure.update_yaxes(title_text="Validation NDCG@10")
    return finish(figure, f"Validation of {len(models):,} runs")


def plot_by_popularity(
    best_runs: Sequence[Run], item_popularity: Mapping[str, np.ndarray]
) -> go.Figure:
    """Draw the test NDCG@10 by the popularity of the target, for the best run of each loss.

    Items stand from the least to the most popular, equally popular ones by id, and are cut into
    groups with a tenth of the training interactions each: the last holds the few items that
    everybody has.

    Raises:
        ValueError: A run ranks another catalogue.
    """
    decile = popularity_deciles(item_popularity["users"])
    figure = go.Figure()
    several = _are_several(best_runs)
    for run in best_runs:
        rankings = run.load_rankings()
        if (n_items := int(rankings["n_items"][0])) != len(decile):
            raise ValueError(
                f"{run.name} ranks {n_items:,} items, but item_popularity is of {len(decile):,}; "
                "run it again on the data of now, or move its folders away"
            )
        groups = decile[rankings["targets"]]
        name = _name(run.loss, run.model, several)
        _add_means(figure, run, name, rankings, groups, [str(1 + n) for n in range(N_DECILES)])
    title = "Popularity of the target: tenths of the interactions, those of the rarest items first"
    figure.update_xaxes(title_text=title, type="category")
    return _finish_means(figure, "Quality by popularity of the target, best run of each loss")


def plot_by_history_length(
    best_runs: Sequence[Run], test_sequences: Mapping[str, np.ndarray]
) -> go.Figure:
    """Draw the test NDCG@10 by the length of the history, for the best run of each loss.

    Raises:
        ValueError: A run has other test users.
    """
    order = np.argsort(test_sequences["users"])
    users = test_sequences["users"][order]
    lengths = np.diff(test_sequences["offsets"])[order]
    firsts = np.unique(np.quantile(lengths, np.arange(N_LENGTHS) / N_LENGTHS, method="lower"))
    lasts = [*(firsts[1:] - 1), lengths.max()]
    labels = [
        str(first) if first == last else f"{first}–{last}"
        for first, last in zip(firsts, lasts, strict=True)
    ]
    figure = go.Figure()
    several = _are_several(best_runs)
    for run in best_runs:
        rankings = run.load_rankings()
        if not np.array_equal(np.sort(rankings["users"]), users):
            raise ValueError(
                f"{run.name} has other test users than test_sequences; "
                "run it again on the data of now, or move its folders away"
            )
        of_users = lengths[np.searchsorted(users, rankings["users"])]
        groups = np.searchsorted(firsts, of_users, "right") - 1
        name = _name(run.loss, run.model, several)
        _add_means(figure, run, name, rankings, groups, labels)
    figure.update_xaxes(title_text="Items in the history", type="category")
    return _finish_means(figure, "Quality by length of the history, best run of each loss")


def popularity_deciles(users_of_items: np.ndarray) -> np.ndarray:
    """Return which tenth of all interactions each item falls into, int64 [n_items] in 0..9.

    An item that reaches into several tenths falls into that of its middle.
    """
    order = np.argsort(users_of_items, kind="stable")
    counts = users_of_items[order].astype(np.float64)
    middle = np.cumsum(counts) - counts / 2
    deciles = np.empty(len(order), dtype=np.int64)
    deciles[order] = np.minimum(middle * N_DECILES / max(counts.sum(), 1), N_DECILES - 1)
    return deciles


def _are_several(runs: Iterable[Run]) -> bool:
    return len({run.model for run in runs if run.loss is not None}) > 1


def _name(loss: str | None, model: str, several: bool) -> str:
    """Call a run by its loss, where there are several models by both; a baseline by its name."""
    if loss is None:
        return model
    return f"{model} + {loss}" if several else loss


def _add_means(
    figure: go.Figure,
    run: Run,
    name: str,
    rankings: Mapping[str, np.ndarray],
    groups: np.ndarray,
    labels: Sequence[str],
) -> None:
    """Add a run's mean NDCG@10 over the users of each group; a group of nobody has none."""
    values = ndcg(torch.from_numpy(rankings["target_ranks"]), CUTOFF).numpy()
    n_users = np.bincount(groups, minlength=len(labels))
    totals = np.bincount(groups, values, minlength=len(labels))
    means = [total / n if n else None for total, n in zip(totals, n_users, strict=True)]
    if run.loss is None:
        line = {"color": BASELINE_COLOUR, "dash": BASELINE_DASHES[run.model]}
    else:
        line = {"color": colour_of(run.loss)}
    figure.add_trace(
        go.Scatter(
            x=labels,
            y=means,
            customdata=n_users,
            mode="lines+markers",
            line=line,
            name=name,
            hovertemplate=f"{run.name}<br>%{{y:.4f}} over %{{customdata:,}} users<extra></extra>",
        )
    )


def _finish_means(figure: go.Figure, title: str) -> go.Figure:
    figure.update_yaxes(title_text="Test NDCG@10", rangemode="tozero")
    return finish(figure, title)
