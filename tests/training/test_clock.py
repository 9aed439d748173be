from __future__ import annotations

import itertools
import time

import pytest
import torch

from sce_pipeline.training import clock as clock_module
from sce_pipeline.training.clock import Clock


def test_parts_take_the_time_between_their_marks(monkeypatch):
    moments = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(moments) ** 2))
    clock = Clock(torch.device("cpu"))
    clock.start()
    for part in ("data", "loss", "data"):
        clock.mark(part)
    assert clock.seconds() == {"data": 1 + 5, "loss": 3}
    clock.mark("loss")
    assert clock.seconds() == {"data": 1 + 5, "loss": 3 + 7}


@pytest.mark.parametrize("lag", [0, 700])
def test_a_long_epoch_holds_few_marks(monkeypatch, lag):
    class Event(float):
        """One that the device passes once ``lag`` more were recorded."""

        alive = last = 0

        def __new__(cls, **_):
            cls.alive += 1
            return super().__new__(cls, cls.last)

        def __del__(self):
            Event.alive -= 1

        def record(self):
            Event.last += 1

        def query(self):
            return self + lag < Event.last

        def elapsed_time(self, end):
            return 1000 * (end - self)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: setattr(Event, "last", 10**9))
    monkeypatch.setattr(clock_module, "MARKS_KEPT", 100)
    clock = Clock(torch.device("cuda"))
    clock.start()
    most = 0
    for step in range(10_000):
        clock.mark(f"part {step % 2}")
        most = max(most, Event.alive)
    assert most <= 110 + lag
    assert clock.seconds() == {"part 0": 5000, "part 1": 5000}
