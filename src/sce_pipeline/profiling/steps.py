"""Real steps of training, taken to see what they cost."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sce_pipeline.evaluation.device import choose_device
from sce_pipeline.parameters import LossParameters, ProfilingEffort, TrainingParameters
from sce_pipeline.profiling.limits import forget, is_out_of_memory, memory_is_finite, release
from sce_pipeline.profiling.memory import Memory, MemoryClock, break_down, meter_for
from sce_pipeline.training.clock import Clock
from sce_pipeline.training.encoder import Encoder
from sce_pipeline.training.fit import build_trainer, describe_hardware
from sce_pipeline.training.ranks import alone
from sce_pipeline.training.trainer import Trainer

Sequences = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Cost:
    """What a step of training takes.

    Attributes:
        step_seconds: Median time of a step.
        loss_seconds: Median time of its loss, forward and backward.
        n_steps: Steps of an epoch.
        n_tokens: Inputs of an epoch.
        memory: What a step holds at its peak.
        reserved: Most bytes that PyTorch's allocator has taken from a GPU, with recorded graphs
            and blocks kept for later; None on a CPU.
        precision: Of products, as in the training history.
    """

    step_seconds: float
    loss_seconds: float
    n_steps: int
    n_tokens: int
    memory: Memory
    reserved: int | None
    precision: str

    @property
    def epoch_seconds(self) -> float:
        """Time of an epoch without validation."""
        return self.step_seconds * self.n_steps


def device_of(parameters: TrainingParameters) -> torch.device:
    """Return the device that training would take."""
    return choose_device(parameters.accelerator, "training.accelerator")


def describe_device(device: torch.device) -> str:
    """Name a device."""
    return describe_hardware(alone(device))


def on_one_device(
    training: TrainingParameters, loss: LossParameters, **changes: Any
) -> TrainingParameters:
    """Return the parameters of training with another loss on one device, which has all items."""
    values = {**training.model_dump(), "loss": loss.model_dump(), "devices": 1, **changes}
    return TrainingParameters.model_validate({**values, "item_table": "replicated"})


def measure_cost(
    sequences: Sequences, parameters: TrainingParameters, effort: ProfilingEffort
) -> Cost | None:
    """Take some steps of training and say what they cost; None if they do not fit.

    In the first two, the backbone runs as it comes, so that all of its memory is seen; in the
    others as in training, where it may be recorded. The device is left as it was found.

    Args:
        sequences: What ``train_sequences`` holds.
        parameters: Of training on one device.
        effort: How many steps are timed.
    """
    device = device_of(parameters)
    try:
        with memory_is_finite(device):
            return _measure(sequences, parameters, device, effort)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    finally:
        # The error is gone, and with it the frames that held what the step had made.
        release(device)
    return None


def _measure(
    sequences: Sequences,
    parameters: TrainingParameters,
    device: torch.device,
    effort: ProfilingEffort,
) -> Cost:
    with meter_for(device) as meter:
        trainer = build_trainer(sequences, parameters, alone(device))
        as_trained, trainer.encoder = trainer.encoder, Encoder(trainer.encoder.encode)
        steps = _Steps(trainer)
        steps.take(MemoryClock(trainer, meter))  # makes Adam's moments
        n_before = meter.n_marks
        clock = MemoryClock(trainer, meter)
        steps.take(clock)
    memory = break_down(meter.marks()[n_before:])
    trainer.encoder = as_trained
    forget(device)
    seconds = _time(steps, device, effort, sum(clock.seconds().values()))
    return Cost(
        statistics.median(sum(parts.values()) for parts in seconds),
        statistics.median(parts["loss"] for parts in seconds),
        len(trainer.batches.steps(1)),
        trainer.batches.n_tokens,
        memory,
        torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None,
        "bf16-mixed" if trainer.half else "32-true",
    )


def _time(
    steps: _Steps, device: torch.device, effort: ProfilingEffort, expected: float
) -> list[dict[str, float]]:
    """Return the seconds of the parts of some steps, of which one is expected to take so long."""
    n_warm_up_steps, n_steps = effort.n_warm_up_steps, effort.n_steps
    if expected > effort.max_step_seconds:
        n_warm_up_steps, n_steps = 0, 1
    clocks = [Clock(device) for _ in range(n_warm_up_steps + n_steps)]
    for clock in clocks:
        steps.take(clock)
    return [clock.seconds() for clock in clocks[n_warm_up_steps:]]


class _Steps:
    """Steps of one epoch after the other, as many as are taken.

    An epoch's last step has what is left of the data and is not taken, unless it is the only one.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._start(1)

    def take(self, clock: Clock) -> None:
        """Take a step under a clock of its own."""
        if self._epoch.done == max(1, self._epoch.n_steps - 1):
            self._start(self._epoch.number + 1)
        self._epoch.clock = clock
        clock.start()
        next(self._iterator)

    def _start(self, number: int) -> None:
        self._epoch = self._trainer.epoch(number)
        self._iterator = iter(self._epoch)
