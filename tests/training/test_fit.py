from __future__ import annotations

import json
import logging
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from walks import (
    MAX_LENGTH,
    N_ITEMS,
    NO_DROPOUT,
    PARAMETERS_OF_LOSSES,
    SCE_OPTIONS,
    make_sequences,
    train,
)

from helpers import make_training
from sce_pipeline.evaluation.metrics import ndcg
from sce_pipeline.evaluation.rankers import rank_with_model
from sce_pipeline.losses import LOSSES
from sce_pipeline.losses.cce_minus import CCEMinus
from sce_pipeline.models import SASRec, load_model
from sce_pipeline.training import progress
from sce_pipeline.training.ranks import Ranks
from sce_pipeline.training.trainer import Trainer

MASKED = {
    "name": "bert4rec",
    "hidden_size": 16,
    "n_blocks": 1,
    "n_heads": 2,
    "dropout": 0.0,
    "mask_probability": 0.2,
    "last_mask_probability": 0.5,
}
RECURRENT = {"name": "gru4rec", "hidden_size": 16, "n_layers": 1, "dropout": 0.0}

each_model = pytest.mark.parametrize(
    "model", [NO_DROPOUT, RECURRENT, MASKED], ids=lambda model: model["name"]
)
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("loss", PARAMETERS_OF_LOSSES, ids=lambda loss: loss["name"])
def test_every_loss_learns_and_repeats_bit_for_bit(tmp_path, loss):
    weights, history = train(tmp_path / "first", loss, max_epochs=8)
    values = [epoch["ndcg@10"] for epoch in history["epochs"]]
    assert max(values) > 0.8  # a random order has 0.12
    assert history["epochs"][-1]["loss"] < history["epochs"][0]["loss"]
    json.dumps(history)

    again, same_history = train(tmp_path / "second", loss, max_epochs=8)
    assert weights.keys() == again.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, again[name]), name
    assert [epoch["loss"] for epoch in history["epochs"]] == [
        epoch["loss"] for epoch in same_history["epochs"]
    ]


@pytest.mark.parametrize("model", [RECURRENT, MASKED], ids=lambda model: model["name"])
@pytest.mark.parametrize("loss", [PARAMETERS_OF_LOSSES[0], PARAMETERS_OF_LOSSES[2]])
def test_other_backbones_learn_and_repeat_bit_for_bit(tmp_path, model, loss):
    options = {"model": model, "max_epochs": 30, "patience": 30}  # a masked model learns by jerks
    runs = [train(tmp_path / name, loss, **options) for name in ("1", "2")]
    (weights, history), (again, _) = runs
    assert max(epoch["ndcg@10"] for epoch in history["epochs"]) > 0.5  # a random order has 0.12
    for name, weight in weights.items():
        assert torch.equal(weight, again[name]), name


@on_gpu
@each_model
@pytest.mark.parametrize("loss", PARAMETERS_OF_LOSSES, ids=lambda loss: loss["name"])
def test_every_backbone_learns_with_every_loss_on_a_gpu(tmp_path, model, loss):
    # A masked model learns by jerks, and the later the fewer items a loss contrasts a target with.
    is_slow = model is MASKED and loss["name"] in ("bce", "gbce", "sce")
    n_epochs = 250 if is_slow else 40
    options = {"model": model, "max_epochs": n_epochs, "patience": n_epochs}
    weights, history = train(tmp_path, loss, **options, accelerator="gpu", precision="auto")
    assert max(epoch["ndcg@10"] for epoch in history["epochs"]) > 0.5  # a random order has 0.12
    assert history["epochs"][-1]["loss"] < history["epochs"][0]["loss"]
    assert all(weight.device.type == "cpu" for weight in weights.values())
    assert all(weight.isfinite().all() for weight in weights.values())


@on_gpu
@each_model
@pytest.mark.parametrize("loss", PARAMETERS_OF_LOSSES[:2], ids=lambda loss: loss["name"])
def test_every_backbone_trains_on_a_gpu_as_on_a_cpu(tmp_path, monkeypatch, model, loss):
    # Unless told otherwise, cuDNN computes a recurrence of float32 in TF32.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    options = {"model": model, "max_epochs": 2, "precision": "32-true"}
    (_, on_cpu), (_, on_card) = (
        train(tmp_path / kind, loss, **options, accelerator=kind) for kind in ("cpu", "gpu")
    )
    for epoch, other in zip(on_cpu["epochs"], on_card["epochs"], strict=True):
        assert other["loss"] == pytest.approx(epoch["loss"], rel=1e-3)
        assert other["gradient_norm"] == pytest.approx(epoch["gradient_norm"], rel=1e-2)
        assert other["ndcg@10"] == pytest.approx(epoch["ndcg@10"], abs=0.02)


def test_no_loss_is_left_out():
    assert {loss["name"] for loss in PARAMETERS_OF_LOSSES} == set(LOSSES)


def test_another_seed_gives_other_weights(tmp_path):
    weights, _ = train(tmp_path / "5", {"name": "ce"}, max_epochs=1)
    other, _ = train(tmp_path / "6", {"name": "ce"}, max_epochs=1, seed=6)
    assert not torch.equal(weights["item_embedding.weight"], other["item_embedding.weight"])


def test_the_best_epochs_weights_come_back_and_patience_stops(tmp_path):
    # At this rate training soon falls apart, so that the best epoch is not the last.
    weights, history = train(tmp_path, {"name": "ce"}, learning_rate=0.2, max_epochs=40, patience=3)
    values = [epoch["ndcg@10"] for epoch in history["epochs"]]
    best = history["best_epoch"]
    assert best == 1 + int(np.argmax(values))
    assert len(values) == best + 3 < 40

    model = load_model(make_training().model, weights, MAX_LENGTH)
    _, validation_sequences = make_sequences(50, seed=1)
    ranking = rank_with_model(model, validation_sequences, k=0, filter_seen=True)
    found = float(ndcg(torch.from_numpy(ranking["target_ranks"]), 10).mean())
    assert found == pytest.approx(max(values), abs=1e-6)


def watch_steps(monkeypatch):
    """Note the mode of the model, the loss and the items of every step."""
    seen = []
    accumulate = Trainer.accumulate

    def watch(trainer, batch, clock):
        loss = accumulate(trainer, batch, clock)
        seen.append((trainer.model.training, float(loss), batch))
        return loss

    monkeypatch.setattr(Trainer, "accumulate", watch)
    return seen


def test_dropout_acts_in_every_epoch_and_not_in_validation(tmp_path, monkeypatch):
    modes = []
    encode = SASRec.encode_last

    def watch_validation(model, *args):
        modes.append(model.training)
        return encode(model, *args)

    steps = watch_steps(monkeypatch)
    monkeypatch.setattr(SASRec, "encode_last", watch_validation)
    train(tmp_path, {"name": "ce"}, max_epochs=3)
    assert len(steps) == 3 * 13
    assert all(training for training, _, _ in steps)
    assert len(modes) >= 3
    assert not any(modes)


def test_the_loss_of_an_epoch_is_the_mean_over_its_tokens(tmp_path, monkeypatch):
    steps = watch_steps(monkeypatch)
    _, history = train(tmp_path, {"name": "ce"}, max_epochs=1)
    losses = np.array([loss for _, loss, _ in steps])
    tokens = np.array([batch.targets.numel() for _, _, batch in steps])
    mean = (losses * tokens).sum() / tokens.sum()
    assert history["epochs"][0]["loss"] == pytest.approx(mean, rel=1e-6)
    assert abs(losses.mean() - mean) > 1e-4  # the batches differ in size enough to tell


def test_the_seed_decides_the_order_of_the_windows(tmp_path, monkeypatch):
    orders = []
    for seed in (5, 6):
        with monkeypatch.context() as patch:
            steps = watch_steps(patch)
            train(tmp_path / str(seed), {"name": "ce"}, max_epochs=1, seed=seed)
        orders.append([batch.items.tolist() for _, _, batch in steps])
    assert orders[0] != orders[1]


def assert_same_but_for_rounding(first, second):
    """Compare weights and history of two runs."""
    for name, weight in first[0].items():
        # Softmax does not feel the keys' bias: its gradient is nothing but rounding.
        if "in_projection.bias" not in name:
            torch.testing.assert_close(second[0][name], weight, rtol=1e-3, atol=1e-4)
    for epoch, other in zip(first[1]["epochs"], second[1]["epochs"], strict=True):
        for key in ("loss", "gradient_norm", "ndcg@10"):
            assert other[key] == pytest.approx(epoch[key], rel=1e-4)


@pytest.mark.parametrize(("parts", "model"), [(2, NO_DROPOUT), (3, NO_DROPOUT), (2, MASKED)])
def test_a_step_in_parts_is_the_same_step(tmp_path, parts, model):
    options = {"max_epochs": 2, "model": model}
    whole, history = train(tmp_path / "whole", {"name": "ce"}, **options)
    weights, in_parts = train(
        tmp_path / "parts", {"name": "ce"}, **options, accumulation_steps=parts
    )
    assert_same_but_for_rounding((whole, history), (weights, in_parts))


def test_batches_of_tokens_train_too(tmp_path, monkeypatch):
    steps = watch_steps(monkeypatch)
    _, history = train(tmp_path, {"name": "ce"}, batch_tokens=60)
    assert all(batch.targets.numel() <= 60 for _, _, batch in steps)
    assert max(epoch["ndcg@10"] for epoch in history["epochs"]) > 0.8


def test_the_history_accounts_for_the_time_of_every_part(tmp_path):
    _, history = train(tmp_path, {"name": "ce"}, max_epochs=2)
    for epoch in history["epochs"]:
        parts = dict(epoch["seconds_by_part"])
        assert parts.pop("validation") == epoch["validation_seconds"]
        assert parts.keys() == {"data", "backbone", "loss", "optimiser"}
        assert sum(parts.values()) == pytest.approx(epoch["training_seconds"], rel=0.2)
        assert epoch["tokens_per_second"] == pytest.approx(
            history["n_tokens"] / epoch["training_seconds"]
        )
        assert epoch["learning_rate"] == 0.01
        assert epoch["gradient_norm"] > 0
        assert epoch["memory_mb"] > 0


def test_a_compiled_backbone_trains_to_the_same(tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("PyTorch compiles with g++, which is not here")
    plain = train(tmp_path / "plain", {"name": "ce"}, max_epochs=1, model=NO_DROPOUT)
    changes = {"max_epochs": 1, "model": NO_DROPOUT, "compile": True}
    assert_same_but_for_rounding(plain, train(tmp_path / "compiled", {"name": "ce"}, **changes))


def test_a_loss_that_needs_item_counts_gets_those_of_the_training_items(tmp_path, monkeypatch):
    seen = []
    use_item_counts = CCEMinus.use_item_counts

    def watch(loss, counts):
        seen.append(counts)
        use_item_counts(loss, counts)

    monkeypatch.setattr(CCEMinus, "use_item_counts", watch)
    for parameters in PARAMETERS_OF_LOSSES:
        if parameters["name"] == "cce_minus":
            train(tmp_path / parameters["sampling"], parameters, max_epochs=1)
    (counts,) = seen
    train_sequences, _ = make_sequences(200, seed=0)
    assert counts.tolist() == np.bincount(train_sequences["items"], minlength=N_ITEMS).tolist()


def test_bfloat16_trains_too(tmp_path):
    _, history = train(tmp_path, {"name": "sce", **SCE_OPTIONS}, precision="bf16-mixed")
    assert max(epoch["ndcg@10"] for epoch in history["epochs"]) > 0.8


def test_training_says_what_it_does(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="sce_pipeline"):
        train(tmp_path, {"name": "ce"}, max_epochs=2)
    text = caplog.text
    assert "training sasrec with ce on" in text
    assert text.count("validation NDCG@10 0.") == 3  # each epoch's line, and the best at the end


def test_output_that_goes_to_a_file_has_lines_and_no_bar(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(progress, "SECONDS_IN_LOG", 0.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)  # what is written goes to stdout
    with caplog.at_level(logging.INFO, logger="sce_pipeline"):
        train(tmp_path, {"name": "ce"}, max_epochs=1)
    assert "epoch 1  step 13 of 13  loss" in caplog.text


def test_of_several_ranks_the_firsts_part_of_the_loss_stands_for_all(monkeypatch, caplog):
    monkeypatch.setattr(progress, "SECONDS_IN_LOG", 0.0)
    measured = torch.tensor([[1.5, 0.1], [np.nan, np.nan]])
    epoch = SimpleNamespace(number=1, n_steps=2, done=0, measured=measured)
    with progress.Progress(Ranks(0, 2, torch.device("cpu"))) as shown:
        shown.start(epoch, n_tokens=10)
        epoch.done = 1
        with caplog.at_level(logging.INFO, logger="sce_pipeline"):
            shown.show(epoch)
    assert "step 1 of 2  loss 3.0000" in caplog.text


@pytest.mark.parametrize(
    ("changes", "advice"),
    [({}, "lower training.batch_size = 16"), ({"batch_tokens": 99}, "training.batch_tokens = 99")],
)
def test_too_little_memory_is_an_error_that_names_what_decides(
    tmp_path, monkeypatch, changes, advice
):
    def fail(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Trainer, "accumulate", fail)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2**30, 2**31))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 2**29)
    with pytest.raises(RuntimeError, match=rf"to 0\.5 GB, 1\.0 of 2\.0 GB were free; .*{advice}"):
        train(tmp_path, {"name": "ce"}, **changes)


def test_a_gpu_that_is_not_there_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"training\.accelerator is gpu, but PyTorch"):
        train(tmp_path, {"name": "ce"}, accelerator="gpu")
