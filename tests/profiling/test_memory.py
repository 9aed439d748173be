from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sce_pipeline.profiling.memory import CPUMeter, GPUMeter, Holdings, Mark, break_down

NOTHING = Holdings(0, 0, 0)


def test_the_cpu_meter_sees_levels_peaks_and_what_operators_take_within():
    size = 2**18
    with CPUMeter() as meter:
        kept = torch.zeros(size)
        meter.mark("kept", NOTHING)
        gone = torch.ones(3 * size)
        del gone
        meter.mark("gone", Holdings(1, 2, 3))
        torch.logsumexp(kept.view(2, -1), 1)  # keeps a number a row, and takes a copy on the way
        meter.mark("within", NOTHING)
        del kept
        meter.mark("let go", NOTHING)
    marks = meter.marks()
    assert [mark.part for mark in marks] == ["kept", "gone", "within", "let go"]
    assert marks[1].holdings == (1, 2, 3)
    levels, peaks = ([getattr(mark, name) for mark in marks] for name in ("level", "peak"))
    assert levels == [4 * size, 4 * size, 4 * size, 0]
    assert peaks[0] == 4 * size
    assert peaks[1] == 16 * size
    assert 8 * size <= peaks[2] < 9 * size
    assert peaks[3] == 4 * size


def test_a_meter_that_something_failed_under_leaves_the_next_one_as_it_should_be():
    with pytest.raises(torch.OutOfMemoryError), CPUMeter():
        raise torch.OutOfMemoryError("as if")
    with CPUMeter() as meter:
        kept = torch.zeros(1000)
        meter.mark("kept", NOTHING)
    assert meter.marks() == [Mark("kept", NOTHING, kept.nbytes, kept.nbytes)]


class Allocator:
    """A GPU's allocator as PyTorch shows it."""

    def __init__(self, monkeypatch, level):
        self.level = self.peak = level
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: self.level)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: self.peak)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: self.reset())

    def reset(self):
        self.peak = self.level

    def take(self, size):
        self.level += size
        self.peak = max(self.peak, self.level)


def test_the_gpu_meter_counts_from_where_it_begins_and_each_peak_by_itself(monkeypatch):
    allocator = Allocator(monkeypatch, 500)
    allocator.peak = 9000  # of something before
    with GPUMeter(torch.device("cuda")) as meter:
        allocator.take(100)
        meter.mark("kept", NOTHING)
        allocator.take(300)
        allocator.take(-350)
        meter.mark("gone", NOTHING)
        meter.mark("nothing", NOTHING)
    assert [mark[2:] for mark in meter.marks()] == [(100, 100), (50, 400), (50, 50)]


SIZES = st.integers(0, 1000)


@given(SIZES, SIZES, SIZES, SIZES, SIZES, SIZES, SIZES)
def test_a_step_is_broken_down_into_what_each_part_took(
    weights, table_gradient, rest_gradient, batch, activations, loss, optimiser_peak
):
    before = Holdings(weights, rest_gradient, 2 * weights)
    after = Holdings(weights, rest_gradient + table_gradient, 2 * weights)
    held = sum(before) + batch
    peak_of_loss = held + activations + table_gradient + loss
    peak = max(peak_of_loss, held + table_gradient + optimiser_peak)
    marks = [
        Mark("", before, sum(before), sum(before)),
        Mark("data", before, held, held),
        Mark("backbone", before, held + activations, held + activations),
        Mark("loss", after, held + activations + table_gradient, peak_of_loss),
        Mark("backbone", after, held + table_gradient, held + activations + table_gradient),
        Mark("optimiser", before, held, peak),
    ]
    found = break_down(marks)
    assert found.state == sum(after)
    assert (found.activations, found.loss) == (activations, loss)
    assert found.other == peak - peak_of_loss + batch
    assert found.peak == peak


def test_of_a_step_in_parts_the_one_with_the_highest_loss_is_broken_down():
    first, summed = Holdings(100, 10, 200), Holdings(100, 110, 200)
    marks = [
        Mark("data", first, 320, 320),
        Mark("backbone", first, 350, 350),
        Mark("loss", summed, 450, 470),
        Mark("backbone", summed, 420, 450),
        Mark("data", summed, 425, 425),
        Mark("backbone", summed, 465, 465),
        Mark("loss", summed, 465, 585),  # a second gradient before it is added to the first
        Mark("backbone", summed, 425, 465),
        Mark("optimiser", first, 320, 425),
    ]
    found = break_down(marks)
    assert (found.activations, found.loss, found.other) == (40, 120, 15)
    assert found.peak == 585
