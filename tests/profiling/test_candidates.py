from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from preset_losses import EFFORT, PRESETS, loss_of
from pydantic import ValidationError

from helpers import make_training
from sce_pipeline.losses.cce import CCE
from sce_pipeline.profiling import candidates
from sce_pipeline.profiling.candidates import choose_losses, measure_candidates, measure_need
from sce_pipeline.profiling.grid import draw_sequences
from sce_pipeline.profiling.limits import free_bytes
from sce_pipeline.profiling.steps import measure_cost, on_one_device

N_ITEMS, LENGTH = 3000, 6
SEQUENCES = draw_sequences(N_ITEMS, 40, LENGTH, seed=0)
FREE = 10**9


def fail_above(monkeypatch, n_tokens, n_items):
    """Let CCE run out of memory with so many tokens or items."""
    compute = CCE._mean_loss

    def fail(loss, hidden, item_embeddings, *rest):
        if len(hidden) >= n_tokens or len(item_embeddings) >= n_items:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return compute(loss, hidden, item_embeddings, *rest)

    monkeypatch.setattr(CCE, "_mean_loss", fail)


def test_losses_are_their_presets_and_the_runs_own_as_it_is_set_with_changes():
    own = loss_of("sce", bucket_size_y=7, n_buckets=3)
    changes = {"cce": {}, "cce_minus": {"n_negatives": 99}, "sce": {"bucket_size_y": 8}}
    found = choose_losses(changes, PRESETS, own)
    assert list(found) == ["cce", "cce_minus", "sce"]
    assert found["cce"].model_dump() == PRESETS["cce"]
    assert found["cce_minus"].model_dump() == {**PRESETS["cce_minus"], "n_negatives": 99}
    assert found["sce"] == loss_of("sce", bucket_size_y=8, n_buckets=3)
    assert choose_losses({"sce": {}}, PRESETS, own) == {"sce": own}
    with pytest.raises(ValidationError, match="n_negative"):
        choose_losses({"cce_minus": {"n_negative": 99}}, PRESETS, own)


def test_every_candidate_is_measured_and_one_that_does_not_fit_is_a_result(monkeypatch):
    fail_above(monkeypatch, 1, 1)
    losses = {name: loss_of(name) for name in ("cce", "sce")}
    found = measure_candidates(SEQUENCES, losses, make_training(batch_size=10), EFFORT)
    assert found.costs["cce"] is None
    assert found.costs["sce"].n_steps == 4
    assert (found.need, found.n_items, found.losses) == (None, N_ITEMS, losses)
    assert found.free > 0
    assert "CPU" in found.device


def test_where_nothing_fits_the_need_is_measured_on_a_catalogue_that_fits(monkeypatch):
    training = make_training(batch_size=20)
    cce = on_one_device(training, loss_of("cce"), accumulation_steps=4)
    direct = measure_cost(SEQUENCES, cce, EFFORT).memory
    fail_above(monkeypatch, 10 * LENGTH, N_ITEMS)  # neither 20 nor 10 sequences at once
    found = measure_candidates(SEQUENCES, {"cce": loss_of("cce")}, training, EFFORT)
    need = found.need
    assert need.free == found.free
    assert need.table == 4 * N_ITEMS * 16
    assert need.rest == direct.parameters - need.table
    assert need.activations >= 4 * direct.activations
    assert need.loss > 0
    assert need.cast == 0  # products are in float32 on this device
    assert (need.batch, need.batch_name, need.n_sequences, need.n_parts) == (
        20,
        "batch_size",
        20,
        1,
    )


def test_the_need_of_a_batch_by_tokens_is_of_its_tokens():
    training = make_training(batch_tokens=60)
    need = measure_need(SEQUENCES, training, EFFORT, FREE)
    assert (need.batch, need.batch_name, need.n_sequences) == (60, "batch_tokens", 10)
    half = measure_need(SEQUENCES, make_training(batch_tokens=30), EFFORT, FREE)
    assert half.activations < 0.6 * need.activations
    assert half.loss < 0.6 * need.loss


def test_the_table_is_cast_where_products_are_in_half_precision(monkeypatch):
    measure = candidates.measure_cost
    monkeypatch.setattr(
        candidates, "measure_cost", lambda *args: replace(measure(*args), precision="bf16-mixed")
    )
    need = measure_need(SEQUENCES, make_training(batch_size=20), EFFORT, FREE)
    assert (need.table, need.cast) == (4 * N_ITEMS * 16, 2 * N_ITEMS * 16)


def test_no_part_is_smaller_than_a_sequence(monkeypatch):
    fail_above(monkeypatch, 1, 1)
    parts = []
    measure = candidates.measure_cost
    monkeypatch.setattr(
        candidates,
        "measure_cost",
        lambda s, p, e: parts.append(p.accumulation_steps) or measure(s, p, e),
    )
    assert measure_need(SEQUENCES, make_training(batch_size=9), EFFORT, FREE) is None
    assert parts == [1, 2, 4, 8]


def test_free_memory_is_some_of_what_the_machine_has():
    assert 2**20 < free_bytes(torch.device("cpu")) < 2**50
