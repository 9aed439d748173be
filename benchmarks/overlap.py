"""How much of a training step goes to exchanges between ranks, from a profiler's trace.

A kernel of NCCL runs from the moment its rank comes to the exchange until all ranks have taken
part, so its time holds the wait for the slowest rank; the rank that waits least is nearest to the
time of the exchange itself. What runs beside other kernels delays a step only as far as it takes
processors from them.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

import torch
from torch.profiler import ProfilerActivity, profile

from sce_pipeline.training.trainer import Trainer

Interval = tuple[float, float]

EXCHANGES = ("ncclDevKernel", "ncclSymk", "gloo:")
"""How names of what exchanges begin: kernels of NCCL, and Gloo's own marks on a CPU."""

SKIPPED_STEPS = 4
"""Steps before those that are traced."""


def join(intervals: Iterable[Interval]) -> list[Interval]:
    """Return disjoint intervals that cover the same, in order."""
    joined: list[Interval] = []
    for start, stop in sorted(intervals):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(stop, joined[-1][1])
        else:
            joined.append((start, stop))
    return joined


def length(intervals: Iterable[Interval]) -> float:
    """Return how much intervals cover together."""
    return sum(stop - start for start, stop in join(intervals))


def shares(exchanges: list[Interval], others: list[Interval]) -> dict[str, float]:
    """Divide the time from the first interval to the last into what was done in it.

    Args:
        exchanges: When something was exchanged, in any order.
        others: When anything else was done.

    Returns:
        ``step``, the whole; ``exchanges``; ``exposed``, the exchanges beside which nothing else was
        done; ``others``; and ``idle``, when nothing was done.
    """
    everything = [*exchanges, *others]
    whole = max(stop for _, stop in everything) - min(start for start, _ in everything)
    busy = length(everything)
    return {
        "step": whole,
        "exchanges": length(exchanges),
        "exposed": busy - length(others),
        "others": length(others),
        "idle": whole - busy,
    }


def trace(trainer: Trainer, n_steps: int) -> dict[str, float]:
    """Take steps with the profiler on; return their number and the ``shares`` of one, seconds.

    All ranks must call it. On a CPU the trace holds PyTorch's operators, the times of which say
    little: it is there so that all of this runs anywhere.

    Args:
        trainer: What takes them, in its first epoch.
        n_steps: Steps that are traced; fewer where the epoch has fewer after those skipped.

    Raises:
        ValueError: It has none after those.
    """
    n_steps = min(n_steps, trainer.epoch(1).n_steps - SKIPPED_STEPS)
    if n_steps < 1:
        raise ValueError(f"expected an epoch of more than {SKIPPED_STEPS} steps to trace")
    # The same steps as will be traced: their shapes are recorded and their kernels compiled.
    take(trainer, SKIPPED_STEPS + n_steps)
    traced(trainer, 1)  # the first trace of a process takes seconds to begin
    found = shares(*traced(trainer, n_steps))
    return {"steps": n_steps, **{name: seconds / n_steps for name, seconds in found.items()}}


def take(trainer: Trainer, n_steps: int) -> None:
    """Take the first steps of the first epoch."""
    for _ in islice(trainer.epoch(1), n_steps):
        pass


def traced(trainer: Trainer, n_steps: int) -> tuple[list[Interval], list[Interval]]:
    """Return when a rank exchanged and when it did anything else, in seconds."""
    device = trainer.ranks.device
    on_gpu = device.type == "cuda"
    steps = iter(trainer.epoch(1))
    for _ in islice(steps, SKIPPED_STEPS):
        pass
    if on_gpu:
        torch.cuda.synchronize()
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        trainer.ranks.agree(True)  # ranks begin to trace at different times, and to step at once
        for _ in islice(steps, n_steps):
            pass
        if on_gpu:
            torch.cuda.synchronize()
    exchanges: list[Interval] = []
    others: list[Interval] = []
    for event in profiler.events():
        if event.device_type.name != device.type.upper():  # what the host does beside a GPU
            continue
        within = event.time_range.start / 1e6, event.time_range.end / 1e6
        if event.name.startswith(EXCHANGES):
            exchanges.append(within)
        elif not event.is_user_annotation:
            others.append(within)
    if not others:
        raise RuntimeError(f"the profiler's trace of rank {trainer.ranks.rank} is empty")
    if trainer.ranks.world > 1:
        if not exchanges:
            raise RuntimeError(f"expected exchanges in the trace, named {' or '.join(EXCHANGES)}…")
        begun = min(exchanges)[1]  # when all ranks had agreed
        exchanges = [each for each in exchanges if each[0] >= begun]
        others = [each for each in others if each[0] >= begun]
    return exchanges, others
