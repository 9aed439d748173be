"""How far training has come: a bar in a terminal, now and then a line elsewhere."""

from __future__ import annotations

import logging
import resource
import sys
import time

import torch
from rich import get_console, progress
from torch import Tensor

from sce_pipeline.training.ranks import Ranks
from sce_pipeline.training.trainer import Epoch

logger = logging.getLogger(__name__)

SECONDS_IN_TERMINAL, SECONDS_IN_LOG = 0.2, 60.0
"""How often the state is shown."""


class Progress:
    """Shows the steps of an epoch with loss, speed, time left and memory.

    Args:
        ranks: The processes that train together; the first shows, and takes its part of the loss
            for all of theirs.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._device = ranks.device
        self._world = ranks.world
        self._enabled = ranks.is_first
        self._in_terminal = self._enabled and get_console().is_terminal
        self._interval = SECONDS_IN_TERMINAL if self._in_terminal else SECONDS_IN_LOG
        self._bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[state]}"),
            transient=True,
            disable=not self._in_terminal,
        )
        self._reading: tuple[Tensor, torch.cuda.Event | None] | None = None

    def __enter__(self) -> Progress:
        """Show the bar."""
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Take the bar away."""
        self._bar.stop()

    def start(self, epoch: Epoch, n_tokens: int) -> None:
        """Begin to show an epoch of ``n_tokens`` tokens."""
        for task in self._bar.task_ids:
            self._bar.remove_task(task)
        self._task = self._bar.add_task(f"epoch {epoch.number}", total=epoch.n_steps, state="")
        self._started = self._shown = time.perf_counter()
        self._first = epoch.done
        self._tokens_per_step = n_tokens / epoch.n_steps
        self._loss = float("nan")

    def show(self, epoch: Epoch) -> None:
        """Show the state after a step, unless it was shown just before."""
        now = time.perf_counter()
        if not self._enabled or now - self._shown < self._interval:
            return
        self._shown = now
        self._read_loss(epoch)
        done = epoch.done - self._first
        per_second = done * self._tokens_per_step / (now - self._started)
        megabytes = peak_megabytes(self._device)
        state = f"loss {self._loss:.4f}  {per_second:,.0f} tokens/s  {megabytes:,} MB"
        if self._in_terminal:
            self._bar.update(self._task, completed=epoch.done, state=state)
            return
        left = (epoch.n_steps - epoch.done) * (now - self._started) / done
        logger.info(
            "epoch %d  step %s of %s  %s  %.0f s left",
            epoch.number,
            f"{epoch.done:,}",
            f"{epoch.n_steps:,}",
            state,
            left,
        )

    def _read_loss(self, epoch: Epoch) -> None:
        """Take the loss that was asked for before, and ask for the newest; waits for nothing."""
        if self._reading is None:
            value = epoch.measured[epoch.done - 1, 0].to("cpu", non_blocking=True)
            event = None
            if self._device.type == "cuda":
                event = torch.cuda.Event()
                event.record()
            self._reading = value, event
        value, event = self._reading
        if event is None or event.query():
            self._loss = float(value) * self._world
            self._reading = None


def peak_megabytes(device: torch.device) -> int:
    """Return the most memory that PyTorch held on the GPU at once, or the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) // 2**20
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes // (2**20 if sys.platform == "darwin" else 2**10)
