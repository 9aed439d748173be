"""What the parts of an epoch take, measured without waiting for the device."""

from __future__ import annotations

import time
from collections import defaultdict, deque

import torch

MARKS_KEPT = 1024
"""From so many marks on, those that the device has passed are added up and let go."""


class Clock:
    """Adds up the time from one mark to the next under the latter's name.

    On a GPU, marks are events in its queue: the time is the GPU's own, and where it waits for the
    host, that counts to the part that it waits for.

    Args:
        device: Whose time is measured.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: deque[tuple[str, torch.cuda.Event | float]] = deque()
        self._totals: dict[str, float] = defaultdict(float)

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
        if len(self._marks) > MARKS_KEPT:
            self._add_up()

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each part; waits for the device."""
        if self._on_gpu:
            torch.cuda.synchronize()
        self._add_up()
        return dict(self._totals)

    def _add_up(self) -> None:
        """Turn the marks that the device has passed into seconds; the last of them stays."""
        while len(self._marks) > 1:
            (_, begin), (part, end) = self._marks[0], self._marks[1]
            if isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
                if not end.query():
                    return
                self._totals[part] += begin.elapsed_time(end) / 1000
            elif isinstance(begin, float) and isinstance(end, float):
                self._totals[part] += end - begin
            self._marks.popleft()
