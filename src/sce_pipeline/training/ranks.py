"""Several processes that train together, each on a device of its own."""

from __future__ import annotations

import logging
import logging.handlers
import multiprocessing
import os
import signal
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.multiprocessing import _prctl_pr_set_pdeathsig  # type: ignore[attr-defined]

logger = logging.getLogger(__name__)

PATIENCE = timedelta(minutes=10)
"""How long a rank waits for the others before it gives up."""

LAST_WORDS = 5.0
"""Seconds for which records of processes that have ended are waited for."""

_TAKEN_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
"""Those that the launcher answers itself and does not give back."""


class Meeting:
    """How far each of several processes has gone, so that all can end after the same step.

    A request to end reaches them in different steps. Had one of them ended while another took a
    step more, that would wait for it, or take what it sends for something else.

    Args:
        n_ranks: Number of processes.
    """

    def __init__(self, n_ranks: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._steps = context.Array("q", [1] * n_ranks)
        self._last = context.Value("q", 0, lock=False)

    def all_end(self, rank: int, asked: bool) -> bool:
        """Return whether all ranks end after the step that this one has taken."""
        with self._steps.get_lock():
            if asked and not self._last.value:
                self._last.value = max(self._steps[:])  # one of them may be in that step already
            ends = self._steps[rank] == self._last.value
            self._steps[rank] += 1
            return ends


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together; alone, nothing is sent anywhere.

    Attributes:
        rank: Number of this process, from 0.
        world: Number of processes.
        device: Device of this process.
        meeting: Where several processes settle when to end.
    """

    rank: int
    world: int
    device: torch.device
    meeting: Meeting | None = None

    @property
    def is_first(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0

    def add(self, *tensors: Tensor) -> None:
        """Replace each tensor by its sum over all ranks."""
        if self.world > 1:
            for tensor in tensors:
                distributed.all_reduce(tensor)

    def agree(self, true: bool) -> bool:
        """Return whether all ranks say so, once all have."""
        if self.world == 1:
            return true
        votes = torch.tensor(int(true), device=self.device)
        distributed.all_reduce(votes, distributed.ReduceOp.MIN)
        return bool(votes)

    def first(self, true: bool) -> bool:
        """Return what the first rank says."""
        return self.agree(true or not self.is_first)

    def all_end(self, asked: bool) -> bool:
        """Return whether all ranks end here, since one was asked to; waits for none of them.

        Args:
            asked: Whether this rank was. All ranks call this as often, at the same places.
        """
        return asked if self.meeting is None else self.meeting.all_end(self.rank, asked)


def alone(device: torch.device) -> Ranks:
    """Return the only process there is."""
    return Ranks(0, 1, device)


def launch(n_ranks: int, device: torch.device, train: Callable[..., object], *args: Any) -> None:
    """Run ``train(ranks, *args)`` in so many processes and wait for all of them.

    What they log is handled here.

    Args:
        n_ranks: Number of processes.
        device: GPUs or CPU; rank i takes the i-th GPU.
        train: A function of a module.
        args: Arguments of it, which every process gets a copy of.

    Raises:
        ValueError: There are fewer GPUs than processes.
        RuntimeError: A process failed; the others are stopped and the message has its error.
        KeyboardInterrupt: Somebody pressed Ctrl-C.
        SystemExit: The system asked to end.
    """
    if device.type == "cuda" and torch.cuda.device_count() < n_ranks:
        raise ValueError(
            f"training.devices is {n_ranks}, but there are {torch.cuda.device_count()} GPUs"
        )
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=n_ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=0,
        monitor_interval=0.1,
        start_method="spawn",
    )
    handlers = {number: signal.getsignal(number) for number in _TAKEN_SIGNALS}
    try:
        with _handled_records() as records:
            elastic_launch(config, _run)(device.type, records, Meeting(n_ranks), train, *args)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        reply = failure.message
        message = reply["message"] if isinstance(reply, dict) else reply
        raise RuntimeError(f"rank {rank} of {n_ranks} failed: {message}") from error
    except SignalException as error:
        if error.sigval is signal.SIGINT:
            raise KeyboardInterrupt from error
        raise SystemExit(128 + error.sigval) from error
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@record
def _run(
    device_type: str, records: Any, meeting: Meeting, train: Callable[..., object], *args: Any
) -> None:
    """Be one of the processes."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    # Should the launcher be killed, the kernel says so with this signal rather than SIGINT.
    _prctl_pr_set_pdeathsig(signal.SIGTERM)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is answered where all were launched
    own = logging.getLogger("sce_pipeline")
    own.setLevel(logging.INFO)
    own.propagate = False
    own.addHandler(logging.handlers.QueueHandler(records))
    if rank > 0:
        own.setLevel(logging.WARNING)
    device = torch.device("cpu")
    if device_type == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
        distributed.init_process_group("nccl", timeout=PATIENCE, device_id=device)
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // world))
        distributed.init_process_group("gloo", timeout=PATIENCE)
    train(Ranks(rank, world, device, meeting), *args)
    distributed.destroy_process_group()  # after a failure the others might never come to it


@contextmanager
def _handled_records() -> Iterator[Any]:
    """Give a queue whose log records, of other processes, are handed to the loggers of this one."""
    records: Any = multiprocessing.get_context("spawn").Queue()

    def handle() -> None:
        while (record := records.get()) is not None:
            logging.getLogger(record.name).handle(record)

    thread = threading.Thread(target=handle, daemon=True)
    thread.start()
    try:
        yield records
    finally:
        # Whoever was killed while it wrote to the queue has locked it for ever.
        records.cancel_join_thread()
        records.put(None)
        thread.join(LAST_WORDS)
