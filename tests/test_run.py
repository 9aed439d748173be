from __future__ import annotations

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from kedro.framework.session import KedroSession
from kedro.io import DatasetError
from kedro.validation.exceptions import ParameterValidationError
from safetensors.numpy import load_file, save_file

from helpers import ROOT, make_log
from sce_pipeline.losses import LOSSES
from sce_pipeline.provenance import stamp_items
from sce_pipeline.training.checkpoint import CheckpointError

SMALL = {
    "split": "temporal_disjoint",
    "data_processing": {"max_length": 16, "split": {"quantile": 0.6}},
    "training": {
        "model": {"hidden_size": 16, "n_blocks": 1},
        "batch_size": 16,
        "learning_rate": 0.01,
        "max_epochs": 4,
        "accelerator": "cpu",
    },
    "evaluation": {"accelerator": "cpu", "n_bootstrap": 50},
}


def run_small(project, **parameters):
    return project.run(**{**SMALL, "dataset": "walk", **parameters})


def test_a_log_without_a_preset_goes_from_file_to_report(project, capsys):
    project.write_log("walk", make_log())
    run_small(project, loss="ce")

    (metrics_file,) = project.versions("08_reporting", "walk", "ce", "metrics.json")
    metrics = json.loads(metrics_file.read_text())
    assert metrics["model"]["ndcg@10"]["value"] > metrics["popularity"]["ndcg@10"]["value"]
    assert set(metrics["model"]["ndcg@10"]) == {"value", "low", "high"}

    (report,) = project.versions("08_reporting", "walk", "ce", "report.txt")
    text = report.read_text()
    for part in ("NDCG", "coverage", "popularity", "sasrec + ce", "took next"):
        assert part.lower() in text.lower()
    assert text.strip() in capsys.readouterr().out

    (weights,) = project.versions("06_models", "walk", "ce", "model_weights.safetensors")
    sequences = load_file(project.path("05_model_input", "walk", "train_sequences.safetensors"))
    n_items = int(sequences["n_items"][0])
    assert load_file(weights)["item_embedding.weight"].shape == (n_items, 16)
    for name in ("training_curve", "metrics_by_k"):
        (figure,) = project.versions("08_reporting", "walk", "ce", f"{name}.json")
        assert json.loads(figure.read_text())["data"]
    summary = json.loads(project.path("08_reporting", "walk", "data_summary.json").read_text())
    assert summary


@pytest.mark.parametrize("loss", sorted(set(LOSSES) - {"ce"}))
def test_every_loss_runs_on_the_same_data(project, loss):
    project.write_log("walk", make_log())
    run_small(project, loss=loss)
    assert project.versions("08_reporting", "walk", loss, "metrics.json")


def test_the_same_seed_gives_the_same_weights_and_metrics_bit_for_bit(project):
    project.write_log("walk", make_log())
    for _ in range(2):
        run_small(project, loss="sce")
    run_small(project, loss="sce", seed=43)
    files = project.versions("06_models", "walk", "sce", "model_weights.safetensors")
    first, again, other = (file.read_bytes() for file in files)
    assert first == again
    assert first != other
    files = project.versions("08_reporting", "walk", "sce", "metrics.json")
    first, again, other = (file.read_bytes() for file in files)
    assert first == again
    assert first != other


@pytest.mark.parametrize("split", ["temporal", "leave_one_out"])
def test_the_other_splits_run_too(project, split):
    project.write_log("walk", make_log())
    data = {"max_length": 16, "stride": 4}
    run_small(project, split=split, data_processing=data, loss="ce")
    assert project.versions("08_reporting", "walk", "ce", "metrics.json")


def test_a_saved_version_is_evaluated_again_on_its_own(project):
    project.write_log("walk", make_log())
    run_small(project, loss="ce")
    (version,) = project.versions("06_models", "walk", "ce", "model_weights.safetensors")
    # The model is that of the weights, not the one that would be trained now.
    training = {**SMALL["training"], "model": {**SMALL["training"]["model"], "n_heads": 4}}
    parameters = {**SMALL, "training": training, "dataset": "walk", "loss": "ce"}
    with KedroSession.create(project.folder, runtime_params=parameters) as session:
        session.run(
            pipeline_names=["evaluation"],
            load_versions={"model_weights": version.parent.name},
        )
    first, second = project.versions("08_reporting", "walk", "ce", "metrics.json")
    assert first.read_bytes() == second.read_bytes()


def test_the_report_on_a_saved_version_is_about_its_own_training(project):
    project.write_log("walk", make_log())
    run_small(project, loss="ce")
    run_small(project, loss="ce", seed=43)
    first, _ = project.versions("06_models", "walk", "ce", "model_weights.safetensors")
    parameters = {**SMALL, "dataset": "walk", "loss": "ce"}
    with KedroSession.create(project.folder, runtime_params=parameters) as session:
        session.run(
            pipeline_names=["evaluation", "reporting"],
            load_versions={"model_weights": first.parent.name},
        )
    of_first, of_second, again = (
        file.read_bytes() for file in project.versions("08_reporting", "walk", "ce", "report.txt")
    )
    assert again == of_first != of_second


def test_runs_and_baselines_are_compared_in_one_report(project):
    project.write_log("walk", make_log())
    for loss in ("ce", "sce"):
        run_small(project, loss=loss)
    assert not project.path("08_reporting", "walk", "baselines").exists()
    assert not project.path("08_reporting", "walk", "comparison").exists()
    fitted = {"item_knn": {"k": 5}, "pure_svd": {"n_factors": 4}}
    run_small(project, pipelines=["baselines"], baselines=fitted)
    # Half a run, as it is left when evaluation fails.
    (metrics,) = project.versions("08_reporting", "walk", "sce", "metrics.json")
    (history,) = project.versions("06_models", "walk", "sce", "training_history.json")
    torn = history.parents[1] / "2000-01-01T00.00.00.000Z" / history.name
    torn.parent.mkdir()
    torn.write_bytes(history.read_bytes())
    run_small(project, pipelines=["comparison"], comparison={"n_permutations": 99})

    def read(name):
        return json.loads(project.path("08_reporting", "walk", "comparison", name).read_text())

    board = {row["loss"] or row["model"]: row for row in read("leaderboard.json")}
    assert set(board) == {"ce", "sce", "popularity", "item_knn", "pure_svd"}
    measured = json.loads(metrics.read_text())
    assert board["sce"]["ndcg@10"] == measured["model"]["ndcg@10"]["value"]
    assert board["popularity"]["ndcg@10"] == measured["popularity"]["ndcg@10"]["value"]
    assert board["sce"]["version"] == metrics.parent.name
    assert board["sce"]["changes"] == "model.hidden_size=16, model.n_blocks=1"
    assert board["item_knn"]["changes"] == "k=5, shrinkage=10.0"
    assert len(read("seed_averages.json")) == 2
    assert len(read("significance.json")) == 10
    for name in ("quality_against_cost", "validation_curves", "quality_by_popularity"):
        assert read(f"{name}.json")["data"]
    html = project.path("08_reporting", "walk", "comparison", "report.html").read_text("utf-8")
    assert "sce/2000-01-01T00.00.00.000Z</td><td>metrics, rankings" in html
    assert metrics.parent.name in html

    (rankings,) = project.versions(
        "07_model_output", "walk", "baselines", "item_knn_rankings.safetensors"
    )
    assert rankings.parent.name == board["item_knn"]["version"] == board["pure_svd"]["version"]
    users = load_file(project.path("05_model_input", "walk", "test_sequences.safetensors"))["users"]
    assert (load_file(rankings)["users"] == users).all()


def test_baselines_are_fitted_on_the_data_asked_for_alone(project):
    project.write_log("walk", make_log())
    run_small(project, pipelines=["data_processing"])
    with pytest.raises(ValueError, match=r"data_processing\.max_length = 16 rather than 8"):
        run_small(
            project,
            pipelines=["baselines"],
            data_processing={**SMALL["data_processing"], "max_length": 8},
        )


def test_sizes_beyond_the_catalogue_are_clamped_and_said(project, caplog):
    project.write_log("walk", make_log())
    training = {**SMALL["training"], "loss": {"bucket_size_y": 10_000}}
    run_small(project, loss="sce", training=training)
    assert "SCE has bucket_size_y = 10000, more than the" in caplog.text
    assert project.versions("08_reporting", "walk", "sce", "metrics.json")


def test_a_partial_run_refuses_the_data_of_another_split(project):
    project.write_log("walk", make_log())
    run_small(project, loss="ce")
    with pytest.raises(ValueError, match=r"split\.name = 'temporal' rather than 'leave_one_out'"):
        run_small(
            project,
            pipelines=["training", "evaluation"],
            loss="ce",
            split="leave_one_out",
            data_processing={"max_length": 16},
        )
    assert len(project.versions("06_models", "walk", "ce", "model_weights.safetensors")) == 1


def test_training_refuses_sequences_that_do_not_say_which_items_they_number(project):
    project.write_log("walk", make_log())
    run_small(project, pipelines=["data_processing"])
    file = project.path("05_model_input", "walk", "validation_sequences.safetensors")
    arrays = load_file(file)
    others = {**arrays, **stamp_items(["another"])}
    save_file(others, file)
    with pytest.raises(ValueError, match="validation_sequences number different items"):
        run_small(project, pipelines=["training"], loss="ce")
    del others["item_fingerprint"]
    save_file(others, file)
    with pytest.raises(ValueError, match="do not say which items they number"):
        run_small(project, pipelines=["training"], loss="ce")


def test_an_unknown_data_set_is_refused_with_those_that_exist(project):
    project.write_log("walk", make_log())
    with pytest.raises(DatasetError, match=r"(?s)nowhere.*walk"):
        run_small(project, dataset="nowhere")


def test_a_bad_value_fails_before_any_node(project):
    project.write_log("walk", make_log())
    with pytest.raises(Exception, match=r"(?s)learning_rat.*Extra inputs are not permitted"):
        run_small(project, training={"learning_rat": 0.1})
    assert not project.path("02_intermediate").exists()


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"datset": "walk"}, "datset\n  Extra inputs are not permitted"),
        ({"batch_size": 1}, "batch_size\n  Extra inputs are not permitted"),
        ({"dataset": "../walk"}, "dataset\n  String should match pattern"),
        ({"dataset": "../../etc"}, "dataset\n  String should match pattern"),
        ({"dataset": "/etc"}, "dataset\n  String should match pattern"),
        ({"dataset": "a\\b"}, "dataset\n  String should match pattern"),
        ({"dataset": ".."}, "dataset\n  String should match pattern"),
        ({"dataset": "walk\n"}, "dataset\n  String should match pattern"),
        ({"dataset": ""}, "dataset\n  String should match pattern"),
        ({"trial": "../../walk"}, "trial\n  String should match pattern"),
        ({"dataset": 7}, "dataset\n  Input should be a valid string"),
        ({"seed": 2**32}, "seed\n  Input should be less than 4294967296"),
        (
            {"training": {"loss": {"name": "ce"}}},
            "loss.ce.n_buckets\n  Extra inputs are not permitted",
        ),
        ({"training": {"seed": 1}}, "seed is 42 but training.seed has 1"),
        ({"dataset_presets": {"walk": {"trainin": {}}}}, "trainin\n  Extra inputs"),
        ({"baselines": {"item_knn": {"n": 3}}}, "item_knn.n\n  Extra inputs"),
        ({"comparison": {"pairs": "all"}}, "Input should be 'best_per_loss'"),
        ({"evaluation": {"cutoffs": [5, 5]}}, "cutoffs must be distinct, got 5, 5"),
    ],
    ids=repr,
)
def test_nothing_given_is_ignored(project, parameters, message):
    project.write_log("walk", make_log())
    with pytest.raises((ValueError, ParameterValidationError), match=re.escape(message)):
        project.run(**parameters)
    assert not project.path("02_intermediate").exists()


def test_an_experiment_cannot_choose_outside_its_globals(project):
    folder = project.folder / "conf/experiments/mine"
    folder.mkdir()
    (folder / "parameters.yml").write_text("loss: bce\n")
    with pytest.raises(ValueError, match=r"loss is 'bce' but training\.loss has 'sce'"):
        project.run(env="experiments/mine")
    (folder / "parameters.yml").unlink()
    (folder / "globals.yml").write_text("los: ce\n")
    with pytest.raises(ValueError, match=r"globals\.yml has los, but only dataset, loss and seed"):
        project.run(env="experiments/mine")


def test_training_and_evaluation_run_without_any_data_frame_library(project):
    project.write_log("walk", make_log())
    run_small(project, loss="ce")
    parameters = {**SMALL, "dataset": "walk", "loss": "ce"}
    code = f"""
import sys
import time
for library in ("narwhals", "pandas", "polars", "pyarrow"):
    sys.modules[library] = None  # importing it fails
from kedro.framework.project import configure_project
from kedro.framework.session import KedroSession
configure_project("sce_pipeline")
with KedroSession.create({str(project.folder)!r}, runtime_params={parameters!r}) as session:
    session.run(pipeline_names=["training", "evaluation"])
"""
    environment = {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=project.folder, env=environment, timeout=120
    )
    assert len(project.versions("08_reporting", "walk", "ce", "metrics.json")) == 2


def test_a_run_that_is_killed_in_training_goes_on_to_the_same_metrics(project, caplog):
    project.write_log("walk", make_log())
    run_small(project, loss="cce")
    training = {"training.checkpoint_steps": 1}
    changes = ",".join(
        f"{name}={value}"
        for name, value in {"dataset": "walk", "loss": "cce", **training, **flat(SMALL)}.items()
    )
    checkpoints = project.path("06_models", "walk", "cce", "checkpoints", "seed_42")
    command = [sys.executable, "-m", "sce_pipeline", "--params", changes]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    again = {**SMALL, "training": {**SMALL["training"], "checkpoint_steps": 1}}
    with subprocess.Popen(command, cwd=project.folder, env=environment) as run:
        try:
            while not list(checkpoints.glob("0*")):
                assert run.poll() is None
                time.sleep(0.005)
            run.send_signal(signal.SIGSTOP)
            with pytest.raises(CheckpointError, match="another run trains in"):
                run_small(project, **again, loss="cce")
        finally:
            run.kill()
    run_small(project, **again, loss="cce")
    assert "going on after epoch" in caplog.text
    undisturbed, killed = project.versions("08_reporting", "walk", "cce", "metrics.json")
    assert undisturbed.read_bytes() == killed.read_bytes()
    histories = project.versions("06_models", "walk", "cce", "training_history.json")
    first, second = (json.loads(file.read_text())["epochs"] for file in histories)
    assert [epoch["loss"] for epoch in first] == [epoch["loss"] for epoch in second]
    assert not checkpoints.exists()


def flat(values, prefix=""):
    """Name nested values as the command line does."""
    found = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def test_the_sample_that_ships_is_the_one_described():
    with gzip.open(ROOT / "data/01_raw/movielens_small/interactions.csv.gz", "rt") as log:
        header, *rows = log.read().splitlines()
    assert header == "userId,movieId,rating,timestamp"
    assert len(rows) == 100_004
