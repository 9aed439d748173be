"""Figures about a run and its data, as interactive Plotly charts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from plotly import graph_objects as go
from plotly.subplots import make_subplots

MODEL_COLOUR, BASELINE_COLOUR = "#1f6f8b", "#c2703d"
METRICS = {
    "hr": "HR",
    "ndcg": "NDCG",
    "mrr": "MRR",
    "coverage": "Coverage",
    "surprisal": "Surprisal",
}
PART_COLOURS = {
    "data": "#8c8c8c",
    "backbone": MODEL_COLOUR,
    "loss": BASELINE_COLOUR,
    "optimiser": "#e0b04b",
    "validation": "#7a9e7e",
}
_GRID = "rgba(128, 128, 128, 0.25)"  # visible on light pages and on the dark one of Kedro-Viz


def finish(figure: go.Figure, title: str, **layout: Any) -> go.Figure:
    """Give a figure its title and the look that all figures share."""
    figure.update_layout(
        title=title,
        template="plotly_white",
        margin={"l": 60, "r": 30, "t": 70, "b": 60},
        **layout,
    )
    figure.update_xaxes(gridcolor=_GRID, zerolinecolor=_GRID)
    return figure.update_yaxes(gridcolor=_GRID, zerolinecolor=_GRID)


def plot_training_curve(history: Mapping[str, Any]) -> go.Figure:
    """Draw the training loss and the validation NDCG@10 of every epoch, and mark the best one."""
    epochs = history["epochs"]
    number = [epoch["epoch"] for epoch in epochs]
    figure = make_subplots(rows=2, shared_xaxes=True, vertical_spacing=0.08)
    for row, (key, title) in enumerate(
        [("loss", "Training loss"), ("ndcg@10", "Validation NDCG@10")], start=1
    ):
        values = [epoch[key] for epoch in epochs]
        line = go.Scatter(x=number, y=values, mode="lines+markers", line={"color": MODEL_COLOUR})
        figure.add_trace(line, row=row, col=1)
        figure.update_yaxes(title_text=title, row=row, col=1)
    best = history["best_epoch"]
    figure.add_vline(x=best, line={"dash": "dot", "color": BASELINE_COLOUR})
    figure.update_xaxes(title_text="Epoch", row=2, col=1)
    loss = history["parameters"]["loss"]["name"]
    title = f"Training with {loss}: best weights after epoch {best} of {len(epochs)}"
    return finish(figure, title, showlegend=False)


def plot_training_time(history: Mapping[str, Any]) -> go.Figure:
    """Draw what the parts of every epoch took: batches, backbone, loss, optimiser, validation."""
    epochs = history["epochs"]
    figure = go.Figure()
    for part, colour in PART_COLOURS.items():
        seconds = [epoch["seconds_by_part"].get(part, 0.0) for epoch in epochs]
        share = sum(seconds) / sum(sum(epoch["seconds_by_part"].values()) for epoch in epochs)
        numbers = [epoch["epoch"] for epoch in epochs]
        name = f"{part} {share:.0%}"
        figure.add_trace(go.Bar(x=numbers, y=seconds, name=name, marker={"color": colour}))
    figure.update_xaxes(title_text="Epoch", tick0=1, dtick=max(1, len(epochs) // 10))
    figure.update_yaxes(title_text="Seconds")
    loss = history["parameters"]["loss"]["name"]
    rate = np.median([epoch["tokens_per_second"] for epoch in epochs])
    memory = max(epoch["memory_mb"] for epoch in epochs)
    title = f"Time of training with {loss}: {rate:,.0f} tokens a second, {memory:,} MB"
    return finish(figure, title, barmode="stack", bargap=0.1)


def plot_metrics(metrics: Mapping[str, Any]) -> go.Figure:
    """Draw each metric against k for the model and the popularity baseline, with intervals."""
    figure = make_subplots(rows=2, cols=3, subplot_titles=list(METRICS.values()))
    for ranking, colour in (("model", MODEL_COLOUR), ("popularity", BASELINE_COLOUR)):
        for place, metric in enumerate(METRICS):
            cutoffs, estimates = _by_cutoff(metrics[ranking], metric)
            values = np.array([estimate["value"] for estimate in estimates])
            # Coverage is no mean over users and comes without an interval.
            low, high = (
                np.array([estimate.get(end, estimate["value"]) for estimate in estimates])
                for end in ("low", "high")
            )
            points = go.Scatter(
                x=[str(k) for k in cutoffs],
                y=values,
                error_y={"array": high - values, "arrayminus": values - low, "symmetric": False},
                mode="lines+markers",
                name=ranking,
                line={"color": colour},
                showlegend=place == 0,
            )
            figure.add_trace(points, row=1 + place // 3, col=1 + place % 3)
    figure.update_yaxes(rangemode="tozero")
    return finish(figure, f"Test metrics at k over {metrics['model']['n_users']:,} users")


def plot_item_popularity(item_popularity: Mapping[str, np.ndarray]) -> go.Figure:
    """Draw the long tail: training users of each item, from the most to the least popular."""
    users = np.sort(item_popularity["users"])[::-1]
    share = np.cumsum(users) / users.sum()
    head = int(np.searchsorted(share, 0.5)) + 1
    # Evenly spaced on the logarithmic axis: a thousand points draw any catalogue.
    ranks = np.unique(np.geomspace(1, users.size, 1000).astype(int))
    line = go.Scatter(x=ranks, y=users[ranks - 1], mode="lines", line={"color": MODEL_COLOUR})
    figure = go.Figure(line).add_vline(x=head, line={"dash": "dot", "color": BASELINE_COLOUR})
    return finish(
        figure,
        f"{head:,} of {users.size:,} items ({head / users.size:.0%}) hold half of the interactions",
        xaxis={"title": "Item, by popularity", "type": "log"},
        yaxis={"title": "Training users", "type": "log"},
    )


def plot_history_lengths(data_summary: Mapping[str, Any]) -> go.Figure:
    """Draw how many training users have histories of which length."""
    lengths = data_summary["history_lengths"]
    edges = np.array(lengths["bin_edges"])
    bars = go.Bar(
        x=edges[:-1],
        y=lengths["counts"],
        width=np.diff(edges),
        offset=0,
        marker={"color": MODEL_COLOUR, "line": {"color": "white", "width": 1}},
    )
    return finish(
        go.Figure(bars),
        f"History lengths of {sum(lengths['counts']):,} training users",
        xaxis={"title": "Training items of a user"},
        yaxis={"title": "Users"},
    )


def _by_cutoff(
    measured: Mapping[str, Any], metric: str
) -> tuple[list[int], list[dict[str, float]]]:
    """Take one metric's estimates in the order of k."""
    cutoffs = sorted(int(name.split("@")[1]) for name in measured if name.startswith(f"{metric}@"))
    return cutoffs, [measured[f"{metric}@{k}"] for k in cutoffs]
