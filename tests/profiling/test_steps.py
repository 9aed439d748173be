from __future__ import annotations

import gc
import weakref

import pytest
import torch
from preset_losses import EFFORT, PRESETS, loss_of

from helpers import make_training
from sce_pipeline.losses import LOSSES
from sce_pipeline.losses.ce import CE
from sce_pipeline.models import build_model
from sce_pipeline.parameters import ProfilingEffort
from sce_pipeline.profiling import steps
from sce_pipeline.profiling.grid import draw_sequences
from sce_pipeline.profiling.steps import measure_cost, on_one_device
from sce_pipeline.training.trainer import Trainer

N_ITEMS, LENGTH, WIDTH, N_SEQUENCES = 5000, 10, 16, 24
SEQUENCES = draw_sequences(N_ITEMS, N_SEQUENCES, LENGTH, seed=0)
TABLE = 4 * N_ITEMS * WIDTH
MODELS = [
    {"name": "sasrec", "hidden_size": WIDTH, "n_blocks": 1, "n_heads": 1, "dropout": 0.1},
    {"name": "gru4rec", "hidden_size": WIDTH, "n_layers": 1, "dropout": 0.1},
    {
        "name": "bert4rec",
        "hidden_size": WIDTH,
        "n_blocks": 1,
        "n_heads": 1,
        "dropout": 0.1,
        "mask_probability": 0.3,
        "last_mask_probability": 0.1,
    },
]


def measure(loss="ce", effort=EFFORT, **changes):
    training = on_one_device(make_training(batch_size=8), loss_of(loss), **changes)
    return measure_cost(SEQUENCES, training, effort)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_state_is_four_copies_and_the_parts_add_up_to_the_peak(loss):
    cost = measure(loss)
    memory = cost.memory
    model = build_model(make_training().model, N_ITEMS, LENGTH)
    weights = sum(weight.nbytes for weight in model.parameters())
    assert memory.parameters == memory.gradients == weights
    assert 2 * weights <= memory.optimiser <= 2 * weights + 200  # and a count of steps each
    parts = ("parameters", "gradients", "optimiser", "activations", "loss", "other")
    assert min(getattr(memory, part) for part in parts) >= 0
    assert sum(getattr(memory, part) for part in parts) == memory.peak
    assert 0 < cost.loss_seconds < cost.step_seconds
    assert cost.epoch_seconds == 3 * cost.step_seconds
    assert (cost.n_steps, cost.n_tokens) == (3, N_SEQUENCES * LENGTH)
    assert (cost.reserved, cost.precision) == (None, "32-true")


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model["name"])
def test_every_backbone_has_activations_that_grow_with_the_batch(model):
    one, two = (measure(model=model, batch_size=size).memory for size in (8, 16))
    hidden = 4 * 8 * LENGTH * WIDTH
    assert one.activations > hidden
    assert two.activations == pytest.approx(2 * one.activations, rel=0.2)


def test_the_memory_of_ce_is_its_logits_and_that_of_sampled_losses_knows_no_catalogue():
    logits = 4 * 8 * LENGTH * N_ITEMS
    ce = measure("ce").memory.loss + TABLE  # which is not there yet when the logits are
    assert 2 * logits <= ce <= 3.1 * logits
    assert measure("ce", batch_size=16).memory.loss > 1.9 * ce - TABLE
    few = draw_sequences(N_ITEMS // 5, N_SEQUENCES, LENGTH, seed=0)
    bce = on_one_device(make_training(batch_size=8), loss_of("bce"))
    sizes = [measure_cost(sequences, bce, EFFORT).memory.loss for sequences in (few, SEQUENCES)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.1)


def test_a_step_in_parts_takes_another_gradient_of_the_table_and_half_the_activations():
    whole = measure("cce", batch_size=16).memory
    parts = measure("cce", batch_size=16, accumulation_steps=2).memory
    half = measure("cce", batch_size=8).memory
    assert parts.loss == pytest.approx(half.loss + TABLE, rel=0.001)
    assert parts.activations == half.activations < whole.activations


def test_a_loss_that_does_not_fit_leaves_nothing_behind(monkeypatch):
    left = []
    build = steps.build_trainer

    def remember(*args):
        trainer = build(*args)
        left.append(weakref.ref(trainer))
        return trainer

    monkeypatch.setattr(steps, "build_trainer", remember)

    def fail(loss, hidden, item_embeddings, *rest):
        hidden @ item_embeddings.T
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(CE, "_mean_loss", fail)
        gc.disable()  # so that nothing else can take it away
        try:
            assert measure() is None
            assert [reference() for reference in left] == [None]
        finally:
            gc.enable()
    assert measure() is not None


def test_a_failure_of_another_kind_is_not_taken_for_a_lack_of_memory(monkeypatch):
    def fail(*args):
        raise RuntimeError("a kernel failed")

    monkeypatch.setattr(CE, "_mean_loss", fail)
    with pytest.raises(RuntimeError, match="a kernel failed"):
        measure()


def count_steps(monkeypatch):
    taken = []
    update = Trainer.update
    monkeypatch.setattr(Trainer, "update", lambda self: taken.append(1) or update(self))
    return taken


def test_as_many_steps_are_taken_as_are_asked_for_over_several_epochs(monkeypatch):
    taken = count_steps(monkeypatch)
    measure(effort=ProfilingEffort(n_warm_up_steps=4, n_steps=5, max_step_seconds=100.0))
    assert len(taken) == 2 + 4 + 5


def test_a_slow_step_is_timed_once(monkeypatch):
    taken = count_steps(monkeypatch)
    measure(effort=ProfilingEffort(n_warm_up_steps=4, n_steps=5, max_step_seconds=1e-9))
    assert len(taken) == 2 + 1


def test_a_measurement_is_of_one_device_whatever_the_run_has():
    sharded = make_training(devices=4, item_table="sharded", loss=PRESETS["cce"])
    found = on_one_device(sharded, loss_of("sce"))
    assert (found.devices, found.item_table, found.loss.name) == (1, "replicated", "sce")
    assert found.model_dump(exclude={"devices", "item_table", "loss"}) == sharded.model_dump(
        exclude={"devices", "item_table", "loss"}
    )
