"""Kills one of the ranks that train, and looks at how the others end and how the run goes on."""

from __future__ import annotations

import logging
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sce_pipeline.parameters import TrainingParameters
from sce_pipeline.training.fit import Sequences, fit

PATIENCE = 60.0
"""Seconds after which processes and memory that have not gone are taken to stay."""

SLACK = 64 * 2**20
"""Bytes of a GPU's memory that may come and go beside these runs."""

STATES_AN_EPOCH = 4
"""States that are saved within an epoch; once the second is there, a rank is killed."""


class Killer(threading.Thread):
    """Kills the youngest rank once states have been saved within the first epoch.

    Args:
        folder: Where the states are.
        n_ranks: Processes that there will be.

    Attributes:
        processes: The ranks, by the numbers of their processes; empty until one is killed.
        killed_at: When that was, as ``time.perf_counter`` tells it.
    """

    def __init__(self, folder: Path, n_ranks: int) -> None:
        super().__init__(daemon=True)
        self.folder = folder
        self.n_ranks = n_ranks
        self.processes: list[int] = []
        self.killed_at = math.nan
        self.over = threading.Event()

    def run(self) -> None:
        """Wait for the states, then kill."""
        while not self.over.wait(0.005):
            if (self.folder / f"{STATES_AN_EPOCH // 2:06}").exists():
                ranks = sorted(child.pid or 0 for child in multiprocessing.active_children())
                os.kill(ranks[-1], signal.SIGKILL)
                self.killed_at = time.perf_counter()
                self.processes = ranks
                return


def kill_a_rank(
    train: Sequences,
    validation: Sequences,
    folder: Path,
    parameters: TrainingParameters,
    device: torch.device,
) -> dict[str, Any]:
    """Train on several devices, kill a rank in the first epoch, and go on to the end.

    Args:
        train: The arrays of ``train_sequences``.
        validation: Those of ``validation_sequences``.
        folder: For the states; empty.
        parameters: How it is trained, on more than one device.
        device: GPU or CPU.

    Returns:
        The error that the run ended with; the seconds from the kill until the error, until all
        processes had gone and until the memory of the GPUs was free; what was left; and where
        the second run went on and how many epochs it has.

    Raises:
        RuntimeError: Training was done before a rank could be killed.
    """
    changes = {"checkpoint_steps": steps_between(train, parameters)}
    parameters = parameters.model_copy(update=changes)
    killer = Killer(folder, parameters.devices)
    free = free_memory(device, parameters.devices)
    killer.start()
    try:
        fit(train, validation, folder, parameters, False)
    except RuntimeError as raised:
        error, seconds = raised, time.perf_counter() - killer.killed_at
    else:
        raise RuntimeError("training was done before a rank could be killed; give it more users")
    finally:
        killer.over.set()
    if not killer.processes:
        raise error

    def memory_left() -> int:
        now = free_memory(device, parameters.devices)
        return max(before - after for before, after in zip(free, now, strict=True))

    found: dict[str, Any] = {
        "error": str(error),
        "seconds_until_error": seconds,
        "seconds_until_processes_gone": until(lambda: not alive(killer.processes), killer),
        "processes_left": len(alive(killer.processes)),
    }
    if device.type == "cuda":
        found["seconds_until_memory_free"] = until(lambda: memory_left() <= SLACK, killer)
        found["memory_left"] = memory_left()
    lines: list[str] = []
    handler = _Listener(lines)
    logger = logging.getLogger("sce_pipeline.training.fit")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    started = time.perf_counter()
    try:
        _, history = fit(train, validation, folder, parameters, False)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    resumed = [line for line in lines if line.startswith("going on")]
    return {
        **found,
        "resumed": resumed[0].split(", from")[0] if resumed else "from the start",
        "steps_an_epoch": math.ceil(history["n_windows"] / parameters.batch_size),
        "checkpoint_steps": parameters.checkpoint_steps,
        "epochs": len(history["epochs"]),
        "losses": [epoch["loss"] for epoch in history["epochs"]],
        "seconds_of_second_run": time.perf_counter() - started,
    }


def steps_between(train: Sequences, parameters: TrainingParameters) -> int:
    """Return the steps from state to state, for ``STATES_AN_EPOCH``."""
    return max(1, len(train["window_starts"]) // parameters.batch_size // STATES_AN_EPOCH)


def free_memory(device: torch.device, n_devices: int) -> list[int]:
    """Return the bytes that are free on each GPU; none on a CPU."""
    if device.type != "cuda":
        return []
    return [torch.cuda.mem_get_info(number)[0] for number in range(n_devices)]


def alive(processes: list[int]) -> list[int]:
    """Return those of the processes that run."""
    return [each for each in processes if Path(f"/proc/{each}").exists() and not is_zombie(each)]


def is_zombie(process: int) -> bool:
    """Return whether a process has ended and only waits to be asked how."""
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
    return status.rpartition(")")[2].split()[0] == "Z"


def until(true: Callable[[], bool], killer: Killer) -> float | None:
    """Return the seconds from the kill until something is so; None where it does not come to be."""
    end = time.perf_counter() + PATIENCE
    while not true():
        if time.perf_counter() > end:
            return None
        time.sleep(0.05)
    return time.perf_counter() - killer.killed_at


class _Listener(logging.Handler):
    """Puts what is logged into a list."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__()
        self.lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
