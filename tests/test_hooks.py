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


def test_what_a_run_does_not_save_is_the_latest(tmp_path):
    for version in (EARLIER, LATER):
        save_beside(tmp_path, version)
    catalog = make_catalog(tmp_path)
    VersionHooks().before_pipeline_run(Pipeline([Node(evaluate, "weights", "found")]), catalog)
    assert catalog.load("weights") == LATER


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
