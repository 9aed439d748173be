from __future__ import annotations

import json
import logging
import shutil
from threading import Thread

import pytest
from kedro.io import DataCatalog
from kedro.pipeline import Node, Pipeline
from kedro.runner import SequentialRunner

from sce_pipeline.hooks import CheckpointHooks, OneRunHooks, VersionHooks

EARLIER, OWN, LATER = (f"2026-01-0{day}T00.00.00.000Z" for day in (1, 2, 3))


def make_catalog(folder, save_version=OWN):
    entry = {
        "type": "json.JSONDataset",
        "filepath": str(folder / "weights.json"),
        "versioned": True,
    }
    return DataCatalog.from_config({"weights": entry}, save_version=save_version)


def save_beside(folder, version):
    """Do what another run does that saves at the same time."""
    file = folder / "weights.json" / version / "weights.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(version))


def evaluate(weights):
    return weights


def test_a_run_loads_its_own_version_whatever_runs_beside_it(tmp_path):
    def train():
        save_beside(tmp_path, LATER)
        return OWN

    nodes = [Node(train, None, "weights"), Node(evaluate, "weights", "found")]
    save_beside(tmp_path, EARLIER)
    catalog = make_catalog(tmp_path)
    VersionHooks().before_pipeline_run(Pipeline(nodes), catalog)
    found = SequentialRunner().run(Pipeline(nodes), catalog)["found"]
    assert found.load() == OWN


def test_a_run_says_nothing_of_what_another_saves_beside_it(tmp_path, recwarn):
    def train():
        save_beside(tmp_path, LATER)
        return OWN

    nodes = [Node(train, None, "weights")]
    catalog = make_catalog(tmp_path)
    VersionHooks().before_pipeline_run(Pipeline(nodes), catalog)
    found = SequentialRunner().run(Pipeline(nodes), catalog)["weights"]
    assert found.load() == OWN
    assert not [warning for warning in recwarn if "Save version" in str(warning.message)]


def test_what_a_run_does_not_save_is_the_latest(tmp_path):
    for version in (EARLIER, LATER):
        save_beside(tmp_path, version)
    catalog = make_catalog(tmp_path)
    VersionHooks().before_pipeline_run(Pipeline([Node(evaluate, "weights", "found")]), catalog)
    assert catalog.load("weights") == LATER


def make_models(folder, **versions):
    """A catalog with weights and training history, versions of which are on disk."""
    entries = {
        "model_weights": {
            "type": "json.JSONDataset",
            "filepath": str(folder / "model_weights.json"),
            "versioned": True,
        },
        "training_history": {
            "type": "sce_pipeline.datasets.training_history.TrainingHistoryDataset",
            "filepath": str(folder / "training_history.json"),
            "versioned": True,
        },
    }
    return DataCatalog.from_config(entries, save_version=OWN, **versions)


def save_models(folder, version, names=("model_weights", "training_history")):
    for name in names:
        file = folder / f"{name}.json" / version / f"{name}.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps({"of": version}))


def describe(model_weights, training_history):
    return model_weights["of"], training_history["of"], training_history["version"]


DESCRIBE = Node(describe, ["model_weights", "training_history"], "found")


def run_with_hooks(catalog, *nodes):
    VersionHooks().before_pipeline_run(Pipeline(nodes), catalog)
    return SequentialRunner().run(Pipeline(nodes), catalog)["found"].load()


def test_the_history_is_that_of_the_latest_weights(tmp_path):
    for version in (EARLIER, OWN):
        save_models(tmp_path, version)
    save_models(tmp_path, LATER, ["training_history"])  # of a run that has not saved its weights
    assert run_with_hooks(make_models(tmp_path), DESCRIBE) == (OWN, OWN, OWN)


def test_the_history_is_that_of_the_weights_asked_for(tmp_path):
    for version in (EARLIER, LATER):
        save_models(tmp_path, version)
    catalog = make_models(tmp_path, load_versions={"model_weights": EARLIER})
    assert run_with_hooks(catalog, DESCRIBE) == (EARLIER,) * 3
    both = dict.fromkeys(["model_weights", "training_history"], EARLIER)
    assert run_with_hooks(make_models(tmp_path, load_versions=both), DESCRIBE) == (EARLIER,) * 3


def test_weights_that_are_saved_after_the_run_began_are_not_loaded(tmp_path):
    save_models(tmp_path, EARLIER)

    def go_on():
        save_models(tmp_path, LATER)
        return "done"

    def describe_then(done, model_weights, training_history):
        return describe(model_weights, training_history)

    then = Node(describe_then, ["done", "model_weights", "training_history"], "found")
    found = run_with_hooks(make_models(tmp_path), Node(go_on, None, "done"), then)
    assert found == (EARLIER,) * 3


def test_the_history_is_that_of_the_run_which_trains(tmp_path):
    save_models(tmp_path, EARLIER)

    def train():
        save_models(tmp_path, LATER)
        return {"of": OWN}, {"of": OWN}

    training = Node(train, None, ["model_weights", "training_history"])
    assert run_with_hooks(make_models(tmp_path), training, DESCRIBE) == (OWN, OWN, OWN)


def test_weights_without_their_history_are_refused_before_any_node(tmp_path):
    save_models(tmp_path, EARLIER)
    save_models(tmp_path, LATER, ["model_weights"])
    with pytest.raises(FileNotFoundError, match="no training history of the weights") as error:
        VersionHooks().before_pipeline_run(Pipeline([DESCRIBE]), make_models(tmp_path))
    for part in (
        f"the weights {LATER}",
        str(tmp_path / "training_history.json" / LATER / "training_history.json"),
        "--load-versions model_weights:<version>",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("trained", "listed"), [([], "none"), (["sce", "cce", "baselines"], "cce, sce")]
)
def test_missing_weights_are_told_with_those_there_are_and_the_command(tmp_path, trained, listed):
    for loss in trained:
        name = "training_history" if loss == "baselines" else "model_weights"
        for version in (EARLIER, LATER):
            save_models(tmp_path / "a_log" / loss, version, [name])
    with pytest.raises(FileNotFoundError) as error:
        run_with_hooks(make_models(tmp_path / "a_log" / "ce"), DESCRIBE)
    for part in (
        "no model is trained on the data set a_log with the loss ce",
        str(tmp_path / "a_log" / "ce" / "model_weights.json"),
        f"Losses with weights on a_log: {listed}.",
        "kedro run --pipelines data_processing,training --params dataset=a_log,loss=ce",
    ):
        assert part in str(error.value)


def test_a_history_of_other_weights_is_refused(tmp_path):
    for version in (EARLIER, LATER):
        save_models(tmp_path, version)
    catalog = make_models(tmp_path, load_versions={"training_history": EARLIER})
    with pytest.raises(
        ValueError, match=f"the version {EARLIER}, but model_weights load in {LATER}"
    ):
        VersionHooks().before_pipeline_run(Pipeline([DESCRIBE]), catalog)


def test_a_run_without_weights_loads_the_history_it_is_asked_for(tmp_path):
    save_models(tmp_path, EARLIER)
    save_models(tmp_path, LATER, ["training_history"])
    plot = Node(lambda history: history["version"], "training_history", "found")
    assert run_with_hooks(make_models(tmp_path), plot) == LATER
    asked = make_models(tmp_path, load_versions={"training_history": EARLIER})
    assert run_with_hooks(asked, plot) == EARLIER


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "seed_42"
    (folder / "000001").mkdir(parents=True)
    return folder


@pytest.mark.parametrize("order", [1, -1])
def test_checkpoints_stay_until_all_that_training_makes_is_saved(folder, order):
    hooks = CheckpointHooks()
    hooks.after_dataset_loaded("checkpoints", folder)
    first, second = ["model_weights", "training_history"][::order]
    for name in ("training_data", first, first):
        hooks.after_dataset_saved(name)
        assert folder.exists()
    hooks.after_dataset_saved(second)
    assert not folder.exists()
    hooks.after_dataset_saved("metrics")


def finish(folder):
    hooks = CheckpointHooks()
    hooks.after_dataset_loaded("checkpoints", folder)
    for name in ("model_weights", "training_history"):
        hooks.after_dataset_saved(name)


def test_a_link_to_another_disk_stays_for_the_next_run(folder, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(folder)
    finish(link)
    assert link.is_symlink()
    assert list(link.iterdir()) == []


def test_a_folder_that_cannot_be_removed_does_not_stop_the_run(folder, monkeypatch, caplog):
    def fail(path):
        raise OSError("resource busy")

    monkeypatch.setattr(shutil, "rmtree", fail)
    with caplog.at_level(logging.WARNING):
        finish(folder)
    assert "resource busy" in caplog.text


def call_in_thread(function):
    """Call a function in a thread of its own, and return what it raised."""
    raised = []

    def call():
        try:
            function()
        except RuntimeError as error:
            raised.append(error)

    thread = Thread(target=call)
    thread.start()
    thread.join()
    return raised


def test_a_run_beside_another_is_refused_until_that_has_ended():
    hooks = OneRunHooks()
    for end in (hooks.after_pipeline_run, hooks.on_pipeline_error):
        hooks.before_pipeline_run()
        (error,) = call_in_thread(hooks.before_pipeline_run)
        assert "another run is going on in this process" in str(error)
        end()
        assert not call_in_thread(hooks.before_pipeline_run)  # and its thread is gone


def test_a_run_that_was_interrupted_is_not_waited_for():
    hooks = OneRunHooks()
    hooks.before_pipeline_run()
    hooks.before_pipeline_run()
