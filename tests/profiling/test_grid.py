from __future__ import annotations

import logging

import numpy as np
import torch
from preset_losses import EFFORT, loss_of

from helpers import make_training
from sce_pipeline.losses.ce import CE
from sce_pipeline.parameters import ProfilingEffort, ProfilingGrid
from sce_pipeline.profiling import grid as grid_module
from sce_pipeline.profiling.grid import draw_sequences, measure_grid
from sce_pipeline.profiling.memory import Memory
from sce_pipeline.profiling.steps import Cost

LOSSES = {name: loss_of(name) for name in ("ce", "cce")}


def make_grid(**changes):
    values = {"losses": tuple(LOSSES), "changes": {}, "length": 6}
    values |= {"n_items": (20, 40), "batch_size": (2, 4)}
    return ProfilingGrid(**{**values, **changes})


def make_cost(seconds):
    return Cost(seconds, seconds / 2, 1, 1, Memory(1, 1, 2, 0, 0, 0), None, "32-true")


def test_sequences_are_windows_of_full_length_within_the_catalogue():
    sequences = draw_sequences(9, 50, 4, seed=3)
    assert np.array_equal(sequences["window_stops"] - sequences["window_starts"], [5] * 50)
    assert np.array_equal(sequences["offsets"], np.arange(51) * 5)
    assert set(sequences["items"]) == set(range(9))


def test_what_does_not_fit_is_a_result_and_the_next_cell_is_measured(monkeypatch, caplog):
    compute = CE._mean_loss

    def fail_when_large(loss, hidden, item_embeddings, *rest):
        if len(hidden) * len(item_embeddings) >= 4 * 6 * 40:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return compute(loss, hidden, item_embeddings, *rest)

    monkeypatch.setattr(CE, "_mean_loss", fail_when_large)
    caplog.set_level(logging.INFO)
    cells = measure_grid(make_grid(), LOSSES, make_training(), EFFORT)
    assert [(c.loss, c.n_items, c.batch_size, c.status) for c in cells] == [
        ("ce", 20, 2, "fits"),
        ("ce", 20, 4, "fits"),
        ("ce", 40, 2, "fits"),
        ("ce", 40, 4, "does not fit"),
        ("cce", 20, 2, "fits"),
        ("cce", 20, 4, "fits"),
        ("cce", 40, 2, "fits"),
        ("cce", 40, 4, "fits"),
    ]
    assert all((cell.cost is not None) == (cell.status == "fits") for cell in cells)
    assert "4 of 8: ce, 4 × 6 tokens, 40 items: does not fit" in caplog.text
    assert "5 of 8: cce, 2 × 6 tokens, 20 items: " in caplog.text


def test_a_loss_that_was_too_slow_is_left_out_at_larger_sizes_alone(monkeypatch):
    measured = []

    def measure(sequences, parameters, effort):
        size = parameters.loss.name, int(sequences["n_items"][0]), parameters.batch_size
        measured.append(size)
        return make_cost(2.0 if size == ("ce", 20, 4) else 0.5)

    monkeypatch.setattr(grid_module, "measure_cost", measure)
    effort = ProfilingEffort(n_warm_up_steps=0, n_steps=1, max_step_seconds=1.0)
    sizes = {"n_items": (40, 20), "batch_size": (8, 4, 2)}
    cells = measure_grid(make_grid(**sizes), LOSSES, make_training(), effort)
    too_slow = [(c.loss, c.n_items, c.batch_size) for c in cells if c.status == "too slow"]
    assert too_slow == [("ce", 20, 8), ("ce", 40, 4), ("ce", 40, 8)]
    assert set(measured) | set(too_slow) == {(c.loss, c.n_items, c.batch_size) for c in cells}
    assert not set(measured) & set(too_slow)
    assert len(cells) == 12


def test_a_batch_of_the_grid_is_computed_at_once_whatever_the_run_does(monkeypatch):
    seen = []
    monkeypatch.setattr(grid_module, "measure_cost", lambda _, given, __: seen.append(given))
    training = make_training(batch_tokens=100, accumulation_steps=2)
    measure_grid(make_grid(batch_size=(1,)), LOSSES, training, EFFORT)
    assert {(t.batch_size, t.batch_tokens, t.accumulation_steps) for t in seen} == {(1, None, 1)}
