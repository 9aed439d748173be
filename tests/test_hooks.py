from __future__ import annotations

import logging
import shutil

import pytest

from sce_pipeline.hooks import CheckpointHooks


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
