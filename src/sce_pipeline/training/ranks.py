"""Several processes that train together, each on a device of its own."""

from __future__ import annotations

import logging
import logging.handlers
import multiprocessing
import os
import signal
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

logger = logging.getLogger(__name__)

PATIENCE = timedelta(minutes=10)
"""How long a rank waits for the others before it gives up."""

_TAKEN_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
"""Those that the launcher answers itself and does not give back."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together; alone, nothing is sent anywhere.

    Attributes:
        rank: Number of this process, from 0.
        world: Number of processes.
        device: Device of this process.
    """

    rank: int
    world: int
    device: torch.device

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
    records: Any = multiprocessing.get_context("spawn").Queue()
    listener = logging.handlers.QueueListener(records, _Forward())
    listener.start()
    handlers = {number: signal.getsignal(number) for number in _TAKEN_SIGNALS}
    try:
        elastic_launch(config, _run)(device.type, records, train, *args)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        reply = failure.message
        message = reply["message"] if isinstance(reply, dict) else reply
        raise RuntimeError(f"rank {rank} of {n_ranks} failed: {message}") from error
    except SignalException as error:
        raise KeyboardInterrupt from error
    finally:
        listener.stop()
        for number, handler in handlers.items():
            signal.signal(number, handler)


@record
def _run(device_type: str, records: Any, train: Callable[..., object], *args: Any) -> None:
    """Be one of the processes."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
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
    train(Ranks(rank, world, device), *args)
    distributed.destroy_process_group()  # after a failure the others might never come to it


class _Forward(logging.Handler):
    """Hands records of other processes to the loggers of this one."""

    def emit(self, record: logging.LogRecord) -> None:
        logging.getLogger(record.name).handle(record)
