"""What the parts of an epoch take, measured without waiting for the device."""

from __future__ import annotations

import time
from collections import defaultdict

import torch


class Clock:
    """Adds up the time from one mark to the next under the latter's name.

    On a GPU, marks are events in its queue: the time is the GPU's own, and where it waits for the
    host, that counts to the part that it waits for.

    Args:
        device: Whose time is measured.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, torch.cuda.Event | float]] = []

    def start(self) -> None:
        """Begin to measure."""
        self.mark("")

    def mark(self, part: str) -> None:
        """End ``part``, which began with the last mark."""
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((part, event))
        else:
            self._marks.append((part, time.perf_counter()))

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each part; waits for the device."""
        totals: dict[str, float] = defaultdict(float)
        if self._on_gpu:
            torch.cuda.synchronize()
        for (_, begin), (part, end) in zip(self._marks, self._marks[1:], strict=False):
            if isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
                totals[part] += begin.elapsed_time(end) / 1000
            elif isinstance(begin, float) and isinstance(end, float):
                totals[part] += end - begin
        return dict(totals)
