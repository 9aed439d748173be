"""What a step of training holds in memory, broken down by what it is for.

All bytes are those that PyTorch's allocator has given out, on a GPU as on a CPU. What a process
takes beside that, for libraries or for blocks that the allocator keeps for later, is in no part.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from sce_pipeline.training.clock import Clock
from sce_pipeline.training.trainer import Trainer

_MARK = "sce_pipeline memory mark"


@dataclass(frozen=True)
class Memory:
    """The bytes of a step at its peak, by what they are for.

    Attributes:
        parameters: Weights of the model, the item table among them.
        gradients: Gradients of all of them.
        optimiser: Adam's moments.
        activations: What the backbone's forward keeps for its backward.
        loss: What the loss takes at its own peak beside the gradient that it leaves.
        other: Batch and data set on the device, and what another part of the step, such as the
            optimiser, takes above the loss's peak.
    """

    parameters: int
    gradients: int
    optimiser: int
    activations: int
    loss: int
    other: int

    @property
    def state(self) -> int:
        """What is there whatever the batch."""
        return self.parameters + self.gradients + self.optimiser

    @property
    def peak(self) -> int:
        """The most that the step held at once."""
        return self.state + self.activations + self.loss + self.other


class Holdings(NamedTuple):
    """The bytes of a trainer's state at some moment."""

    parameters: int
    gradients: int
    optimiser: int


class Mark(NamedTuple):
    """The end of a part of a step.

    Attributes:
        part: Its name.
        holdings: The trainer's state at its end.
        level: Bytes held at its end.
        peak: The most bytes held since the mark before.
    """

    part: str
    holdings: Holdings
    level: int
    peak: int


class Meter(ABC):
    """Reads the bytes held at marks and between them, from where it is entered."""

    def __init__(self) -> None:
        self._noted: list[tuple[str, Holdings]] = []
        self._levels: list[tuple[int, int]] = []

    def mark(self, part: str, holdings: Holdings) -> None:
        """End a part of a step."""
        self._noted.append((part, holdings))
        self._read()

    @property
    def n_marks(self) -> int:
        """How many marks there have been."""
        return len(self._noted)

    def marks(self) -> list[Mark]:
        """Return all marks; to be called once the meter is left."""
        return [
            Mark(*noted, *levels) for noted, levels in zip(self._noted, self._levels, strict=True)
        ]

    @abstractmethod
    def __enter__(self) -> Meter:
        """Begin at 0 bytes."""

    @abstractmethod
    def __exit__(self, *error: object) -> None:
        """End."""

    @abstractmethod
    def _read(self) -> None:
        """Note the level, and the peak since the last reading."""


class GPUMeter(Meter):
    """Asks the allocator of a GPU, which counts on the host and waits for nothing."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def __enter__(self) -> GPUMeter:
        """Begin at 0 bytes."""
        self._start = torch.cuda.memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        return self

    def __exit__(self, *error: object) -> None:
        """End."""

    def _read(self) -> None:
        level = torch.cuda.memory_allocated(self._device)
        peak = torch.cuda.max_memory_allocated(self._device)
        self._levels.append((level - self._start, peak - self._start))
        torch.cuda.reset_peak_memory_stats(self._device)


class CPUMeter(Meter):
    """Adds up what PyTorch's profiler has seen the allocator give out and take back.

    The allocator of a CPU keeps no account. What operators take within themselves is seen too,
    which a look at the tensors that they return would miss.
    """

    def __enter__(self) -> CPUMeter:
        """Begin at 0 bytes."""
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or each profile writes to the terminal
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Add up, unless something has failed."""
        self._profile.stop()
        if error[0] is not None:
            return
        profiler = self._profile.profiler
        assert profiler is not None  # noqa: S101
        assert profiler.kineto_results is not None  # noqa: S101
        level = peak = 0
        for event in sorted(profiler.kineto_results.events(), key=lambda event: event.start_ns()):
            if event.name() == "[memory]":
                level += event.nbytes()  # type: ignore[attr-defined]
                peak = max(peak, level)
            elif event.name() == _MARK:
                self._levels.append((level, peak))
                peak = level

    def _read(self) -> None:
        with record_function(_MARK):
            pass


class MemoryClock(Clock):
    """A clock that has the memory read at each of its marks.

    Args:
        trainer: Whose steps are looked at.
        meter: Entered.
    """

    def __init__(self, trainer: Trainer, meter: Meter) -> None:
        super().__init__(trainer.ranks.device)
        self._trainer = trainer
        self._meter = meter

    def mark(self, part: str) -> None:
        """End ``part``, which began with the last mark."""
        super().mark(part)
        self._meter.mark(part, measure_holdings(self._trainer))


def meter_for(device: torch.device) -> Meter:
    """Return what reads the memory of ``device``."""
    return GPUMeter(device) if device.type == "cuda" else CPUMeter()


def measure_holdings(trainer: Trainer) -> Holdings:
    """Return the bytes of weights, gradients and moments, as far as there are any now."""
    weights = list(trainer.model.parameters())
    moments = [
        value for of_weight in trainer.optimizer.state.values() for value in of_weight.values()
    ]
    return Holdings(
        _bytes(weights),
        _bytes(weight.grad for weight in weights if weight.grad is not None),
        _bytes(moments),
    )


def break_down(marks: Sequence[Mark]) -> Memory:
    """Say what the memory of a step was for, from its marks.

    Where a step has several parts, that in which the loss had its highest peak is taken.

    Args:
        marks: Those of a whole step of a trainer that has taken one before.
    """
    at_loss = max(
        (place for place, mark in enumerate(marks) if mark.part == "loss"),
        key=lambda place: marks[place].peak,
    )
    batch, encoded, derived = marks[at_loss - 2 : at_loss + 1]
    held = derived.holdings
    activations = encoded.level - batch.level
    # What is there before the loss has no gradient of the table, or that of earlier parts.
    before = encoded.level - encoded.holdings.gradients + held.gradients
    loss = max(0, derived.peak - before)
    other = max(mark.peak for mark in marks) - sum(held) - activations - loss
    return Memory(*held, activations, loss, other)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
