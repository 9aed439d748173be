"""Runs that are killed, interrupted, fed with nonsense or run side by side."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from kill_again_and_again import live
from walks import PARAMETERS_OF_LOSSES, make_sequences, train

from helpers import make_training
from sce_pipeline.training.checkpoint import CheckpointError
from sce_pipeline.training.fit import fit
from sce_pipeline.training.trainer import NotFiniteError, Trainer
from sce_pipeline.training.validation import Validation

CE = {"name": "ce"}
METRICS = ("epoch", "loss", "gradient_norm", "ndcg@10", "hr@10")


def result_of(weights, history):
    metrics = [{key: epoch[key] for key in METRICS} for epoch in history["epochs"]]
    return metrics, {name: weight.tolist() for name, weight in weights.items()}


def test_fifty_kills_change_nothing(tmp_path):
    script = Path(__file__).with_name("kill_again_and_again.py")
    paths = [str(Path(__file__).parent), *filter(None, sys.path)]
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "killed"), "50"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == live(tmp_path / "undisturbed")


def interrupt_at(monkeypatch, step, action):
    """Do something at the end of a step."""
    steps = []
    update = Trainer.update

    def watch(trainer):
        norm = update(trainer)
        steps.append(norm)
        if len(steps) == step:
            action()
        return norm

    monkeypatch.setattr(Trainer, "update", watch)
    return steps


@pytest.mark.parametrize("loss", PARAMETERS_OF_LOSSES, ids=lambda loss: loss["name"])
def test_ctrl_c_loses_nothing(tmp_path, monkeypatch, loss):
    expected = result_of(*train(tmp_path / "undisturbed", loss, max_epochs=2))
    with monkeypatch.context() as patch:
        interrupt_at(patch, 17, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "interrupted", loss, max_epochs=2)
    left = interrupt_at(monkeypatch, -1, None)
    assert result_of(*train(tmp_path / "interrupted", loss, max_epochs=2)) == expected
    assert len(left) == 2 * 13 - 17


def test_the_systems_request_to_end_loses_nothing(tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(SystemExit) as raised:
            train(tmp_path, CE, max_epochs=1)
    assert raised.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    left = interrupt_at(monkeypatch, -1, None)
    train(tmp_path, CE, max_epochs=1)
    assert len(left) == 13 - 4


def test_ctrl_c_in_the_last_validation_is_heard_and_loses_nothing(tmp_path, monkeypatch):
    expected = result_of(*train(tmp_path / "undisturbed", CE, max_epochs=1))
    measure = Validation.measure

    def press(validation):
        signal.raise_signal(signal.SIGINT)
        return measure(validation)

    with monkeypatch.context() as patch:
        patch.setattr(Validation, "measure", press)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "interrupted", CE, max_epochs=1)
    steps = interrupt_at(monkeypatch, -1, None)
    assert result_of(*train(tmp_path / "interrupted", CE, max_epochs=1)) == expected
    assert steps == []


def test_a_second_ctrl_c_ends_at_once(tmp_path, monkeypatch):
    def press_twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    steps = interrupt_at(monkeypatch, 2, press_twice)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, CE)
    assert len(steps) == 2


def test_a_run_that_was_done_gives_its_result_again_without_training(tmp_path, monkeypatch):
    first = result_of(*train(tmp_path, CE, max_epochs=2))
    steps = interrupt_at(monkeypatch, -1, None)
    assert result_of(*train(tmp_path, CE, max_epochs=2)) == first
    assert steps == []


def test_going_on_is_said(tmp_path, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 15, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, CE)
    with caplog.at_level(logging.INFO, logger="sce_pipeline"):
        train(tmp_path, CE)
    assert "going on after epoch 1 and 2 steps" in caplog.text


def test_other_parameters_are_refused(tmp_path):
    train(tmp_path, CE, max_epochs=1)
    with pytest.raises(CheckpointError, match=r"training\.learning_rate = 0\.01 rather than 0\.02"):
        train(tmp_path, CE, max_epochs=1, learning_rate=0.02)


def test_other_data_is_refused(tmp_path):
    train(tmp_path, CE, max_epochs=1)
    train_sequences, _ = make_sequences(200, seed=0)
    _, validation = make_sequences(50, seed=1)
    changed = {**train_sequences, "items": train_sequences["items"][::-1].copy()}
    with pytest.raises(CheckpointError, match=r"with train_sequences = '[0-9a-f]+' rather than"):
        fit(changed, validation, tmp_path, make_training(max_epochs=1), filter_seen=True)


def test_what_is_not_finite_stops_with_step_loss_and_norm_and_leaves_the_last_state(
    tmp_path, monkeypatch
):
    undisturbed = result_of(*train(tmp_path / "undisturbed", CE, max_epochs=3))
    with monkeypatch.context() as patch:
        update = Trainer.update
        steps = []

        def spoil(trainer):
            steps.append(None)
            if len(steps) == 16:  # the third step of the second epoch
                trainer.table.weight.grad[3, 1] = np.nan
            return update(trainer)

        patch.setattr(Trainer, "update", spoil)
        with pytest.raises(NotFiniteError, match=r"step 3 of epoch 2 has the loss [\d.]+ and grad"):
            train(tmp_path / "spoilt", CE, max_epochs=3)
    assert result_of(*train(tmp_path / "spoilt", CE, max_epochs=3)) == undisturbed


def test_a_learning_rate_without_measure_is_found_out(tmp_path):
    with pytest.raises(NotFiniteError, match=r"norm (nan|inf): lower training\.learning_rate"):
        train(tmp_path, CE, learning_rate=1e30)
    assert not any(path.name.isdigit() for path in tmp_path.iterdir())


def test_a_checkpoint_that_cannot_be_written_does_not_stop_training(tmp_path, monkeypatch, caplog):
    expected = result_of(*train(tmp_path / "undisturbed", CE, max_epochs=2))
    save = torch.save

    def save_to_a_full_disk(state, file):
        with Path("/dev/full").open("wb", buffering=0) as full:
            save(state, full)

    monkeypatch.setattr(torch, "save", save_to_a_full_disk)
    found = result_of(*train(tmp_path / "full", CE, max_epochs=2, checkpoint_steps=5))
    assert found == expected
    assert "could not write a checkpoint" in caplog.text


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_too_little_memory_on_a_gpu_is_an_error_with_the_figures(tmp_path):
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(2**24 / total)
    try:
        with pytest.raises(RuntimeError, match=r"took up to .* GB, .*lower training\.batch_size"):
            train(tmp_path, CE, accelerator="gpu", batch_size=200, model=WIDE)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


WIDE = {"name": "sasrec", "hidden_size": 512, "n_blocks": 4, "n_heads": 1, "dropout": 0.0}
