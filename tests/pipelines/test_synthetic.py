from __future__ import annotations

import json

import polars as pl
import pytest
from kedro.framework.project import pipelines
from kedro.io import DatasetError
from kedro.validation.exceptions import ParameterValidationError

from sce_pipeline.parameters import SyntheticParameters
from sce_pipeline.synthetic.histories import draw_log
from sce_pipeline.synthetic.world import World

PLANTED = {"n_users": 300, "n_items": 200, "n_clusters": 4, "longest_history": 40}
PARAMETERS = {
    "dataset": "planted",
    "split": "leave_one_out",
    "data_processing": {"filters": {"min_users_per_item": 1, "min_items_per_user": 1}},
    "synthetic": PLANTED,
    "evaluation": {"n_bootstrap": 20, "accelerator": "cpu"},
}


def read_best(project):
    return json.loads(project.path("08_reporting", "planted", "synthetic_oracle.json").read_text())


def test_a_synthetic_log_is_drawn_and_then_trained_on(project):
    project.run(pipelines=["synthetic"], **PARAMETERS)
    report = read_best(project)
    planted = SyntheticParameters.model_validate(report["planted"])
    assert planted.model_dump() | PLANTED == planted.model_dump()
    written = pl.read_parquet(project.path("01_raw", "planted", "interactions.parquet"))
    (chunk,) = draw_log(World(planted))
    expected = pl.DataFrame(dict(zip(("userid", "itemid", "timestamp"), chunk, strict=True)))
    assert written.equals(expected)

    training = {
        "model": {"hidden_size": 16, "n_blocks": 1},
        "max_epochs": 2,
        "accelerator": "cpu",
        "learning_rate": 0.01,
    }
    project.run(loss="ce", training=training, **PARAMETERS)
    (file,) = project.versions("08_reporting", "planted", "ce", "metrics.json")
    metrics = json.loads(file.read_text())
    best = report["best"]["leave_one_out"]
    assert metrics["model"]["n_users"] == best["n_users"] == 300
    for ranker in ("model", "popularity"):
        assert metrics[ranker]["ndcg@10"]["value"] < best["latent"]["ndcg@10"]["value"]


def test_temporal_protocols(project, caplog):
    changed = {**PARAMETERS, "split": "temporal"}
    project.run(pipelines=["synthetic"], **changed)
    best = read_best(project)["best"]
    assert 0 < best["temporal"]["n_users"] < best["leave_one_out"]["n_users"]
    assert "drops rows" not in caplog.text


def test_what_the_best_metrics_do_not_cover_is_said(project, caplog):
    changed = {**PARAMETERS, "split": "temporal_disjoint", "data_processing": {}}
    project.run(pipelines=["synthetic"], **changed)
    assert "for leave_one_out alone" in caplog.text
    assert "data_processing.filters drops rows of it" in caplog.text
    assert set(read_best(project)["best"]) == {"leave_one_out"}


def test_a_log_that_somebody_brought_is_safe(project):
    file = project.write_log("planted", [("u", "i", 1)])
    before = file.read_bytes()
    with pytest.raises(DatasetError, match=r"already has interactions\.csv"):
        project.run(pipelines=["synthetic"], **PARAMETERS)
    assert [path.name for path in file.parent.iterdir()] == ["interactions.csv"]
    assert file.read_bytes() == before


def test_drawing_the_same_log_again_is_no_error_and_another_is(project):
    project.run(pipelines=["synthetic"], **PARAMETERS)
    file = project.path("01_raw", "planted", "interactions.parquet")
    before = file.read_bytes()
    project.run(pipelines=["synthetic"], **PARAMETERS)
    with pytest.raises(DatasetError, match=r"already has interactions\.parquet"):
        project.run(pipelines=["synthetic"], **PARAMETERS, seed=7)
    assert file.read_bytes() == before


def test_the_default_run_draws_nothing(project):
    drawing = {node.name for node in pipelines["synthetic"].nodes}
    default = {node.name for node in pipelines["__default__"].nodes}
    assert drawing
    assert not drawing & default


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_itms": 10}, "n_itms\n  Extra inputs"),
        ({"n_clusters": 7}, "n_items must be a multiple of n_clusters, got n_items = 200"),
        ({"transition": 0.6}, r"transition \+ cluster must be below 1"),
        ({"n_successors": 51}, "a cluster must hold n_successors = 51 items, got .* = 50"),
        ({"longest_history": 4}, "at least shortest_history = 5, got 4"),
        ({"longest_history": 101}, "at most half of n_items = 200, got 101"),
        ({"shortest_history": 2}, "greater than or equal to 3"),
        ({"n_items": 2**31}, r"below 2\^31"),
    ],
    ids=str,
)
def test_senseless_parameters_are_refused_before_any_node(project, changes, message):
    changed = {**PARAMETERS, "synthetic": {**PLANTED, **changes}}
    with pytest.raises(ParameterValidationError, match=message):
        project.run(pipelines=["synthetic"], **changed)
    assert not project.path("01_raw").exists()
