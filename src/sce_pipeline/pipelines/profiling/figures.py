"""Figures of what losses cost over a grid of sizes, as interactive Plotly charts."""

from __future__ import annotations

import polars as pl
from plotly import graph_objects as go
from plotly.subplots import make_subplots

from sce_pipeline.pipelines.comparison.figures import BASELINE_COLOUR, colour_of
from sce_pipeline.pipelines.reporting.figures import finish
from sce_pipeline.profiling.suggestion import EXACT

PARTS = ("parameters", "gradients", "optimiser", "activations", "loss", "other")
"""What the memory of a step is for, in the order of a hover text."""

NONE_FITS = "none fits"
"""What stands where no loss has a time."""


def plot_memory(loss_profile: pl.DataFrame) -> go.Figure:
    """Draw the peak memory of a step against the catalogue, a line for each loss."""
    parts = "<br>".join(f"{part} %{{customdata[{n}]:,.1f}} MB" for n, part in enumerate(PARTS))
    return _plot_against_catalogue(
        loss_profile,
        "peak_allocated_mb",
        "Peak memory of a step, MB",
        f"%{{y:,.1f}} MB<br>{parts}",
        [f"{part}_mb" for part in PARTS],
    )


def plot_time(loss_profile: pl.DataFrame) -> go.Figure:
    """Draw the time of a step against the catalogue, a line for each loss."""
    return _plot_against_catalogue(
        loss_profile,
        "step_ms",
        "Time of a step, ms",
        "%{y:,.2f} ms, %{customdata[0]:,.2f} of them in the loss",
        ["loss_ms"],
    )


def plot_best_losses(loss_profile: pl.DataFrame) -> go.Figure:
    """Draw which loss is fastest, of those that fit, and how much slower an exact one is."""
    names = [*loss_profile["loss"].unique(maintain_order=True), NONE_FITS]
    n_items = sorted(loss_profile["n_items"].unique())
    batch_sizes = sorted(loss_profile["batch_size"].unique())
    cells = [[_cell(loss_profile, n, size) for n in n_items] for size in batch_sizes]
    fastest = [[_fastest(cell) for cell in row] for row in cells]
    figure = go.Figure(
        go.Heatmap(
            x=[f"{n:,}" for n in n_items],
            y=[f"{size:,}" for size in batch_sizes],
            z=[[names.index(name) for name in row] for row in fastest],
            zmin=-0.5,
            zmax=len(names) - 0.5,
            colorscale=_steps([*map(colour_of, names[:-1]), BASELINE_COLOUR]),
            showscale=False,
            text=[[f"{_fastest(cell)}{_exact(cell)}" for cell in row] for row in cells],
            texttemplate="%{text}",
            textfont={"size": 14},
            customdata=[[_list_times(cell) for cell in row] for row in cells],
            hovertemplate="%{y} sequences, %{x} items<br>%{customdata}<extra></extra>",
            xgap=2,
            ygap=2,
        )
    )
    figure.update_xaxes(title_text="Items in the catalogue", type="category")
    figure.update_yaxes(title_text=f"Sequences of {_length(loss_profile)}", type="category")
    return finish(
        figure,
        f"Fastest loss that fits, and the time of an exact one, {_device(loss_profile)}",
    )


def _plot_against_catalogue(
    profile: pl.DataFrame, column: str, title: str, hover: str, details: list[str]
) -> go.Figure:
    """Draw a column against the catalogue, a panel for each batch and a line for each loss."""
    batch_sizes = sorted(profile["batch_size"].unique())
    figure = make_subplots(
        cols=len(batch_sizes),
        shared_yaxes=True,
        horizontal_spacing=0.03,
        subplot_titles=[f"{size:,} × {_length(profile)}" for size in batch_sizes],
    )
    for loss in profile["loss"].unique(maintain_order=True):
        for place, batch_size in enumerate(batch_sizes, start=1):
            rows = profile.filter(pl.col("loss") == loss, pl.col("batch_size") == batch_size).sort(
                "n_items"
            )
            line = go.Scatter(
                x=rows["n_items"].to_list(),
                y=rows[column].to_list(),
                customdata=rows.select(details).rows(),
                mode="lines+markers",
                line={"color": colour_of(loss)},
                name=loss,
                legendgroup=loss,
                showlegend=place == 1,
                hovertemplate=f"{loss}, %{{x:,}} items<br>{hover}<extra></extra>",
            )
            figure.add_trace(line, row=1, col=place)
            figure.update_xaxes(title_text="Items", type="log", row=1, col=place)
    figure.update_yaxes(type="log")
    figure.update_yaxes(title_text=title, row=1, col=1)
    ends = "lines end where a step does not fit or is too slow"
    return finish(figure, f"{title}, {_device(profile)}; {ends}")


def _cell(profile: pl.DataFrame, n_items: int, batch_size: int) -> pl.DataFrame:
    """Return the losses at a size, the fastest first and those without a time last."""
    rows = profile.filter(pl.col("n_items") == n_items, pl.col("batch_size") == batch_size)
    return rows.sort("step_ms", nulls_last=True)


def _fastest(cell: pl.DataFrame) -> str:
    name, milliseconds = cell.select("loss", "step_ms").row(0)
    return NONE_FITS if milliseconds is None else name


def _exact(cell: pl.DataFrame) -> str:
    """Say how many times as long as the fastest loss the fastest exact one takes."""
    times = cell.drop_nulls("step_ms")
    exact = times.filter(pl.col("loss").is_in(EXACT))
    if times.is_empty() or exact["loss"].first() == times["loss"][0]:
        return ""
    if exact.is_empty():
        return "<br>none exact"
    return f"<br>{exact['loss'][0]} × {exact['step_ms'][0] / times['step_ms'][0]:.1f}"


def _list_times(cell: pl.DataFrame) -> str:
    return "<br>".join(
        f"{loss}: {status}" if milliseconds is None else f"{loss}: {milliseconds:,.2f} ms"
        for loss, milliseconds, status in cell.select("loss", "step_ms", "status").rows()
    )


def _steps(colours: list[str]) -> list[tuple[float, str]]:
    """Return a scale on which each whole number has a colour of its own."""
    n = len(colours)
    return [(end / n, colour) for place, colour in enumerate(colours) for end in (place, place + 1)]


def _length(profile: pl.DataFrame) -> str:
    return f"{profile['length'][0]:,} tokens"


def _device(profile: pl.DataFrame) -> str:
    return f"on {profile['device'][0]}"
