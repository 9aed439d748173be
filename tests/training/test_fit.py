from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from sce_pipeline.evaluation.metrics import ndcg
from sce_pipeline.evaluation.rankers import rank_with_model
from sce_pipeline.losses import LOSSES
from sce_pipeline.losses.cce_minus import CCEMinus
from sce_pipeline.models import SASRec, load_model
from sce_pipeline.parameters import LossParameters, TrainingParameters
from sce_pipeline.training.fit import fit
from sce_pipeline.training.module import NextItemModule

N_ITEMS, MAX_LENGTH = 40, 8
SAMPLED = {"n_negatives": 16, "exclude": "history", "impl": "auto"}
CCE_OPTIONS = {
    "label_smoothing": 0.0,
    "z_loss": 0.0,
    "logit_scale": 1.0,
    "logq_correction": False,
    "skip_mass": 0.0,
    "impl": "auto",
}
SCE_OPTIONS = {
    "n_buckets": "auto",
    "bucket_size_x": "auto",
    "bucket_size_y": 16,
    "mix_x": True,
    "impl": "auto",
}
PARAMETERS_OF_LOSSES = [
    {"name": "ce"},
    {"name": "cce", **CCE_OPTIONS},
    {"name": "ce_minus", **SAMPLED, "shared": "sequence", "log_correction": True},
    *(
        {
            "name": "cce_minus",
            "n_negatives": 16,
            "shared": "token",
            "sampling": sampling,
            "log_correction": True,
            "impl": "auto",
        }
        for sampling in ("uniform", "popularity")
    ),
    {"name": "bce", **SAMPLED, "shared": "token"},
    {"name": "gbce", **SAMPLED, "shared": "token", "t": 0.75},
    {"name": "sce", **SCE_OPTIONS},
    {
        "name": "rece",
        "n_buckets": "auto",
        "n_extra_chunks": 1,
        "n_rounds": 4,
        "duplicate_correction": True,
        "impl": "auto",
    },
]


def make_sequences(n_users, seed):
    """Users who walk the catalogue in steps of one: the last item tells the next."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(3, 12, n_users)
    offsets = np.cumsum([0, *lengths])
    starts = generator.integers(0, N_ITEMS, n_users)
    items = np.concatenate(
        [
            (start + np.arange(length)) % N_ITEMS
            for start, length in zip(starts, lengths, strict=True)
        ]
    ).astype(np.int32)
    shared = {
        "users": np.arange(n_users, dtype=np.int32),
        "items": items,
        "offsets": offsets,
        "n_items": np.array([N_ITEMS]),
        "max_length": np.array([MAX_LENGTH]),
    }
    train = {
        **shared,
        "window_starts": np.maximum(offsets[1:] - MAX_LENGTH - 1, offsets[:-1]),
        "window_stops": offsets[1:],
    }
    held_out = {**shared, "targets": (items[offsets[1:] - 1] + 1).astype(np.int32) % N_ITEMS}
    return train, held_out


def make_parameters(loss, **changes):
    values = {
        "seed": 5,
        "model": {
            "name": "sasrec",
            "hidden_size": 16,
            "n_blocks": 1,
            "n_heads": 1,
            "dropout": 0.1,
        },
        "loss": TypeAdapter(LossParameters).validate_python(loss),
        "batch_size": 16,
        "learning_rate": 0.01,
        "betas": (0.9, 0.98),
        "max_epochs": 6,
        "patience": 6,
        "accelerator": "cpu",
        "precision": "32-true",
    }
    return TrainingParameters.model_validate({**values, **changes})


def train(tmp_path, loss, **changes):
    train_sequences, _ = make_sequences(200, seed=0)
    _, validation_sequences = make_sequences(50, seed=1)
    parameters = make_parameters(loss, **changes)
    tmp_path.mkdir(exist_ok=True)
    return fit(train_sequences, validation_sequences, tmp_path, parameters, filter_seen=True)


@pytest.mark.parametrize("loss", PARAMETERS_OF_LOSSES, ids=lambda loss: loss["name"])
def test_every_loss_learns_and_repeats_bit_for_bit(tmp_path, loss):
    weights, history = train(tmp_path / "first", loss)
    values = [epoch["ndcg@10"] for epoch in history["epochs"]]
    assert max(values) > 0.8  # a random order has 0.12
    assert history["epochs"][-1]["loss"] < history["epochs"][0]["loss"]
    json.dumps(history)

    again, same_history = train(tmp_path / "second", loss)
    assert weights.keys() == again.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, again[name]), name
    assert [epoch["loss"] for epoch in history["epochs"]] == [
        epoch["loss"] for epoch in same_history["epochs"]
    ]


def test_no_loss_is_left_out():
    assert {loss["name"] for loss in PARAMETERS_OF_LOSSES} == set(LOSSES)


def test_another_seed_gives_other_weights(tmp_path):
    weights, _ = train(tmp_path, {"name": "ce"}, max_epochs=1)
    other, _ = train(tmp_path, {"name": "ce"}, max_epochs=1, seed=6)
    assert not torch.equal(weights["item_embedding.weight"], other["item_embedding.weight"])


def test_the_best_epochs_weights_come_back_and_patience_stops(tmp_path):
    # At this rate training soon falls apart, so that the best epoch is not the last.
    weights, history = train(tmp_path, {"name": "ce"}, learning_rate=0.2, max_epochs=40, patience=3)
    values = [epoch["ndcg@10"] for epoch in history["epochs"]]
    best = history["best_epoch"]
    assert best == 1 + int(np.argmax(values))
    assert len(values) == best + 3 < 40

    model = load_model(make_parameters({"name": "ce"}).model, weights, MAX_LENGTH)
    _, validation_sequences = make_sequences(50, seed=1)
    ranking = rank_with_model(model, validation_sequences, k=0, filter_seen=True)
    found = float(ndcg(torch.from_numpy(ranking["target_ranks"]), 10).mean())
    assert found == pytest.approx(max(values), abs=1e-6)


def test_two_runs_in_one_folder_keep_out_of_each_others_way(tmp_path, monkeypatch):
    alone, _ = train(tmp_path / "alone", {"name": "ce"}, max_epochs=2)
    load = torch.load

    def train_another_first(*args, **kwargs):
        monkeypatch.setattr(torch, "load", load)
        train(tmp_path / "both", {"name": "ce"}, max_epochs=2, seed=6)
        return load(*args, **kwargs)

    monkeypatch.setattr(torch, "load", train_another_first)
    beside, _ = train(tmp_path / "both", {"name": "ce"}, max_epochs=2)
    assert all(torch.equal(weight, beside[name]) for name, weight in alone.items())
    assert list((tmp_path / "both").iterdir()) == []


def test_dropout_acts_in_every_epoch_and_not_in_validation(tmp_path, monkeypatch):
    modes = []
    step, encode = NextItemModule.training_step, SASRec.encode_last

    def watch_step(module, batch):
        modes.append(("step", module.model.training))
        return step(module, batch)

    def watch_validation(model, *args):
        modes.append(("validation", model.training))
        return encode(model, *args)

    monkeypatch.setattr(NextItemModule, "training_step", watch_step)
    monkeypatch.setattr(SASRec, "encode_last", watch_validation)
    train(tmp_path, {"name": "ce"}, max_epochs=3)
    assert set(modes) == {("step", True), ("validation", False)}
    assert modes.count(("step", True)) == 3 * 13


def test_the_loss_of_an_epoch_is_the_mean_over_its_tokens(tmp_path, monkeypatch):
    seen = []
    step = NextItemModule.training_step

    def watch(module, batch):
        loss = step(module, batch)
        seen.append((float(loss), batch.targets.numel()))
        return loss

    monkeypatch.setattr(NextItemModule, "training_step", watch)
    _, history = train(tmp_path, {"name": "ce"}, max_epochs=1)
    losses, tokens = (np.array(column) for column in zip(*seen, strict=True))
    mean = (losses * tokens).sum() / tokens.sum()
    assert history["epochs"][0]["loss"] == pytest.approx(mean, rel=1e-6)
    assert abs(losses.mean() - mean) > 1e-4  # the batches differ in size enough to tell


def test_the_seed_decides_the_order_of_the_windows(tmp_path, monkeypatch):
    orders = []
    step = NextItemModule.training_step

    def watch(module, batch):
        orders[-1].append(batch.items.tolist())
        return step(module, batch)

    monkeypatch.setattr(NextItemModule, "training_step", watch)
    for seed in (5, 6):
        orders.append([])
        train(tmp_path, {"name": "ce"}, max_epochs=1, seed=seed)
    assert orders[0] != orders[1]


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


def test_half_precision_that_only_a_gpu_has_is_refused_on_a_cpu(tmp_path):
    with pytest.raises(ValueError, match=r"training\.precision is 16-mixed, which needs a GPU"):
        train(tmp_path, {"name": "ce"}, precision="16-mixed")


def test_bfloat16_trains_too(tmp_path):
    _, history = train(tmp_path, {"name": "sce", **SCE_OPTIONS}, precision="bf16-mixed")
    assert max(epoch["ndcg@10"] for epoch in history["epochs"]) > 0.8


def test_training_says_what_it_does(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="sce_pipeline"):
        train(tmp_path, {"name": "ce"}, max_epochs=2)
    text = caplog.text
    assert "training sasrec with ce on" in text
    assert text.count("validation NDCG@10 0.") == 3  # each epoch's line, and the best at the end


def test_a_loss_that_is_no_longer_finite_stops_training(tmp_path, monkeypatch):
    step = NextItemModule.training_step
    monkeypatch.setattr(
        NextItemModule, "training_step", lambda module, batch: step(module, batch) * np.inf
    )
    with pytest.raises(
        ValueError, match=r"loss is (inf|nan) in epoch 1: lower training\.learning_rate"
    ):
        train(tmp_path, {"name": "ce"})


def test_a_gpu_that_is_not_there_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"training\.accelerator is gpu, but PyTorch"):
        train(tmp_path, {"name": "ce"}, accelerator="gpu")
