from __future__ import annotations

import json

import polars as pl
import pytest
import torch
from kedro.validation.exceptions import ParameterValidationError
from pydantic import ValidationError

from helpers import SMALL_RUN
from sce_pipeline.losses.ce import CE
from sce_pipeline.pipeline_registry import register_pipelines
from sce_pipeline.pipelines.comparison.figures import colour_of
from sce_pipeline.pipelines.profiling.figures import (
    NONE_FITS,
    plot_best_losses,
    plot_memory,
    plot_time,
)
from sce_pipeline.pipelines.profiling.nodes import SCHEMA

SMALL_PROFILE = {
    "effort": {"n_warm_up_steps": 0, "n_steps": 1},
    "grid": {"losses": ["ce", "sce"], "n_items": [30, 600], "batch_size": [4], "length": 8},
}


def profile(project, **grid):
    changed = {**SMALL_PROFILE, "grid": {**SMALL_PROFILE["grid"], **grid}}
    return project.run(pipelines=["profiling"], **SMALL_RUN, profiling=changed)


def test_the_default_pipeline_profiles_nothing(project):
    pipelines = register_pipelines()
    on_request = {node.name for name in ("profiling", "suggest") for node in pipelines[name].nodes}
    assert {"profiling.profile_losses", "suggest.suggest_settings"} < on_request
    assert not on_request & {node.name for node in pipelines["__default__"].nodes}


def test_a_grid_becomes_a_table_and_figures_without_any_data(project, monkeypatch):
    compute = CE._mean_loss

    def fail_when_large(loss, hidden, item_embeddings, *rest):
        if len(item_embeddings) == 600:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return compute(loss, hidden, item_embeddings, *rest)

    monkeypatch.setattr(CE, "_mean_loss", fail_when_large)
    profile(project)
    folder = project.path("08_reporting", "walk", "profiling")
    table = pl.read_csv(folder / "loss_profile.csv", infer_schema_length=None)
    assert table.columns == list(SCHEMA)
    assert table.height == 4
    fits = table.filter(pl.col("status") == "fits")
    failed = table.filter(pl.col("status") == "does not fit")
    assert failed.select("loss", "n_items").unique().rows() == [("ce", 600)]
    assert fits.height == 3
    assert failed["step_ms"].null_count() == failed["peak_allocated_mb"].null_count() == 1
    parts = ("parameters", "gradients", "optimiser", "activations", "loss", "other")
    sums = fits.select(pl.sum_horizontal(f"{part}_mb" for part in parts)).to_series()
    assert sums.to_list() == pytest.approx(fits["peak_allocated_mb"].to_list())
    assert (fits["step_ms"] > fits["loss_ms"]).all()
    for name in ("loss_memory", "loss_time", "best_losses"):
        assert json.loads((folder / f"{name}.json").read_text())["data"]


def test_losses_are_measured_with_the_changes_that_are_asked_for(project):
    changes = {"cce_minus": {"n_negatives": 7}, "sce": {"bucket_size_y": 5}}
    changes |= {"bce": {"n_negatives": 3}}  # not among the losses
    losses = ["cce", "cce_minus", "sce"]
    profile(project, losses=losses, changes=changes, n_items=[30])
    folder = project.path("08_reporting", "walk", "profiling")
    table = pl.read_csv(folder / "loss_profile.csv", infer_schema_length=None)
    found = dict(table.select("loss", "changes").rows())
    assert found == {"cce": None, "cce_minus": "n_negatives=7", "sce": "bucket_size_y=5"}


def make_profile():
    """Two batches, two catalogues: sce wins where ce does not fit, nothing fits at the largest."""
    times = {
        ("ce", 10, 2): 1.0,
        ("sce", 10, 2): 2.0,
        ("ce", 1000, 2): None,
        ("sce", 1000, 2): 3.0,
        ("ce", 10, 4): 5.0,
        ("sce", 10, 4): 4.0,
        ("ce", 1000, 4): None,
        ("sce", 1000, 4): None,
    }
    sizes = [name for name in SCHEMA if name.endswith("_mb")]
    rows = [
        {
            "loss": loss,
            "n_items": n_items,
            "batch_size": batch_size,
            "length": 8,
            "status": "does not fit" if time is None else "fits",
            "step_ms": time,
            "loss_ms": None if time is None else time / 2,
            "device": "an H100",
            **(dict.fromkeys(sizes) if time is None else dict.fromkeys(sizes, 10 * time)),
        }
        for (loss, n_items, batch_size), time in times.items()
    ]
    return pl.DataFrame(rows, schema=SCHEMA)


@pytest.mark.parametrize(("plot", "factor"), [(plot_time, 1), (plot_memory, 10)])
def test_a_line_for_each_loss_and_a_panel_for_each_batch(plot, factor):
    figure = plot(make_profile())
    lines = {(line.name, line.xaxis): line for line in figure.data}
    assert set(lines) == {(loss, axis) for loss in ("ce", "sce") for axis in ("x", "x2")}
    assert lines["sce", "x"].x == lines["ce", "x2"].x == (10, 1000)
    assert lines["sce", "x"].y == (2 * factor, 3 * factor)
    assert lines["ce", "x2"].y == (5 * factor, None)
    assert lines["ce", "x"].line.color == colour_of("ce") != colour_of("sce")
    assert [line.name for line in figure.data if line.showlegend] == ["ce", "sce"]
    assert "an H100" in figure.layout.title.text
    assert [note.text for note in figure.layout.annotations] == ["2 × 8 tokens", "4 × 8 tokens"]


def test_the_map_has_the_fastest_loss_that_fits_in_its_colour():
    (tiles,) = plot_best_losses(make_profile()).data
    assert (tiles.x, tiles.y) == (("10", "1,000"), ("2", "4"))
    words = [["ce", "sce<br>none exact"], ["sce<br>ce × 1.2", NONE_FITS]]
    assert [list(row) for row in tiles.text] == words
    scale = dict(tiles.colorscale[::2])
    n = len(scale)
    for texts, places in zip(tiles.text, tiles.z, strict=True):
        for text, place in zip(texts, places, strict=True):
            name = text.split("<br>")[0]
            share = (place - tiles.zmin) / (tiles.zmax - tiles.zmin)
            colour = scale[max(start for start in scale if start <= share)]
            assert name == NONE_FITS or colour == colour_of(name)
    assert n == 3
    assert tiles.customdata[0][1] == "sce: 3.00 ms<br>ce: does not fit"


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (
            {"losses": ["ce", "sec"]},
            "grid.losses has 'sec', but there is no such preset; choose of ce, cce",
        ),
        ({"changes": {"scee": {}}}, "grid.changes has 'scee', but there is no such preset"),
        ({"changes": {"sce": {"bucket": 1}}}, "grid.losses has 'sce', whose values are bad: "),
        ({"losses": []}, "grid.losses\n  .*at least 1 item"),
        (
            {"losses": ["ce", "ce"]},
            "grid.losses\n  .*expected distinct values, got ce, ce",
        ),
        ({"n_items": [9, 100]}, r"n_items must be at least length \+ 2 = 10, .*; got 9"),
        ({"n_items": [100, 0]}, r"grid.n_items.1\n  Input should be greater than 0"),
        ({"batch": [1]}, "grid.batch\n  Extra inputs are not permitted"),
    ],
    ids=str,
)
def test_a_bad_grid_is_refused_before_anything_is_measured(project, grid, message):
    with pytest.raises((ValidationError, ParameterValidationError), match=message):
        profile(project, **grid)
