"""A process group of a few processes on this machine, to run tests' functions in."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import multiprocessing

import sce_pipeline.collectives  # noqa: F401 - before there is a group, for the reason given there
from interpreted import hasten_interpreter


class Ranks:
    """Processes that stay; each call of ``run`` runs one function in all of them.

    Args:
        world: How many there are.
        store: A file that does not exist yet, where they find each other.
    """

    def __init__(self, world: int, store: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        self.connections = []
        self.processes = []
        for rank in range(world):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world, store, there), daemon=True)
            process.start()
            self.connections.append(here)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Return what ``function(rank, *arguments)`` of a module returns on each rank."""
        for connection in self.connections:
            connection.send((function, arguments))
        answers = []
        for connection in self.connections:
            assert connection.poll(60), "a rank has not answered within a minute"
            answers.append(connection.recv())
        for rank, (_, error) in enumerate(answers):
            assert error is None, f"on rank {rank}: {error}"
        return [result for result, _ in answers]

    def close(self) -> None:
        """End the processes."""
        for connection in self.connections:
            connection.send(None)
        for process in self.processes:
            process.join(10)
            process.kill()
            assert process.exitcode == 0, f"a rank ended with {process.exitcode}"


def _serve(rank: int, world: int, store: Path, connection: Any) -> None:
    torch.set_num_threads(1)
    hasten_interpreter()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    while (task := connection.recv()) is not None:
        function, arguments = task
        try:
            connection.send((function(rank, *arguments), None))
        except Exception:
            connection.send((None, traceback.format_exc()))
    dist.barrier()  # who leaves first would break the others' connections
    dist.destroy_process_group()
