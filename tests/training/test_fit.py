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
from sce_pipeline.models import load_model
from sce_pipeline.parameters import LossParameters, TrainingParameters
from sce_pipeline.training.fit import fit

N_ITEMS, MAX_LENGTH = 40, 8
SAMPLED = {"n_negatives": 16, "exclude": "history"}
PARAMETERS_OF_LOSSES = [
    {"name": "ce"},
    {"name": "ce_minus", **SAMPLED, "shared": "sequence", "log_correction": True},
    {"name": "bce", **SAMPLED, "shared": "token"},
    {"name": "gbce", **SAMPLED, "shared": "token", "t": 0.75},
    {
        "name": "sce",
        "n_buckets": "auto",
        "bucket_size_x": "auto",
        "bucket_size_y": 16,
        "mix_x": True,
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

    model = load_model(make_parameters({"name": "ce"}).model, weights)
    _, validation_sequences = make_sequences(50, seed=1)
    ranking = rank_with_model(model, validation_sequences, k=0, filter_seen=True)
    found = float(ndcg(torch.from_numpy(ranking["target_ranks"]), 10).mean())
    assert found == pytest.approx(max(values), abs=1e-6)


def test_training_says_what_it_does(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="sce_pipeline"):
        train(tmp_path, {"name": "ce"}, max_epochs=2)
    text = caplog.text
    assert "training sasrec with ce on" in text
    assert text.count("validation NDCG@10 0.") == 3  # each epoch's line, and the best at the end


def test_a_gpu_that_is_not_there_is_an_error(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(Exception, match=r"(?i)gpu|cuda"):
        train(tmp_path, {"name": "ce"}, accelerator="gpu")
